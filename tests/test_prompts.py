"""Weighted and long prompts: the notation, what a weight does, what is remembered; sizes beside the text."""

import copy
import pickle
import time

import pytest
import torch

from ldm.conditioning.clip import CLIPTextEncoder
from ldm.conditioning.clip_tokenizer import CLIPTokenizer
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.memory import Memory
from ldm.conditioning.prompts import EMPHASIS, MAX_WEIGHT, parse
from ldm.conditioning.sizes import AestheticScore, Sizes
from ldm.utils.errors import ConfigError, DataError
from tests.test_clip import CPU, text_network, toy_vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer(*toy_vocabulary())


def make(tokenizer, **knobs):
    return CLIPTextEncoder(text_network(tokenizer), tokenizer, **knobs)


# -------------------------------------------------------------------------------------------------------- notation

UP, DOWN = 1.1, 1 / 1.1
TABLE = {
    "": [],
    "a cat": [("a cat", 1)],
    "a (red) cat": [("a ", 1), ("red", UP), (" cat", 1)],
    "a [red] cat": [("a ", 1), ("red", DOWN), (" cat", 1)],
    "(a red cat:1.3)": [("a red cat", 1.3)],
    "((red)) [[cat]]": [("red", UP * UP), (" ", 1), ("cat", DOWN * DOWN)],
    "(a (red:2) cat:0.5)": [("a ", 0.5), ("red", 1.0), (" cat", 0.5)],
    "([cat])": [("cat", UP * DOWN)],
    "(cat: .5 ) (red:-1) (a:2.)": [("cat", 0.5), (" ", 1), ("red", -1), (" ", 1), ("a", 2)],
    r"cat \(red\) \[a\] \\ \a": [(r"cat (red) [a] \ \a", 1)],
    r"(cat \(red\):1.5)": [("cat (red)", 1.5)],
    "(a:b:1.5)": [("a:b", 1.5)],
    "()(:2)[]a": [("a", 1)],
    "[cat:1.3]": [("cat:1.3", DOWN)],  # only round brackets take a number
    "(cat:red)": [("cat:red", UP)],
    "(cat:1.2.3)": [("cat:1.2.3", UP)],
}
MALFORMED = ["(cat", "cat)", "(cat:1.3", "cat:1.3)", "[cat", "cat]", ")(", "][", "((", "(cat]", "[cat)", ":-)", "3:4"]


@pytest.mark.parametrize("prompt", TABLE, ids=str)
def test_parts_and_weights(prompt):
    parts = parse(prompt)
    assert [text for text, _ in parts] == [text for text, _ in TABLE[prompt]]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in TABLE[prompt]])


@pytest.mark.parametrize("prompt", MALFORMED)
def test_brackets_without_a_partner_are_text(prompt):
    assert parse(prompt) == [(prompt, 1.0)]
    assert parse(f"a (red:1.5) {prompt}")[:2] == [("a ", 1.0), ("red", 1.5)]


def test_crossed_brackets():
    assert parse("(a [b) c] (d:1.5)") == [("a [b", 1.1), (" c] ", 1.0), ("d", 1.5)]


def test_no_prompt_is_slow_or_endless():
    n = 20_000
    start = time.process_time()
    for prompt in ("(" * n, ")" * n, "[" * n + ")" * n, "([" * n + "])" * n, "\\" * n, ":1" * n, "(a:1)" * n):
        parse(prompt)
    assert time.process_time() - start < 5  # a second or so; quadratic would be hours
    for prompt in (f"(cat:{'9' * 400})", "(" * n + "cat" + ")" * n, f"(cat:{MAX_WEIGHT + 1})"):
        with pytest.raises(DataError, match="prompt: 'cat' has weight .*, expected at most 100"):
            parse(prompt)


# ------------------------------------------------------------------------------------------------- what weights do


def test_formulas_by_hand():
    z = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])  # 1 2 2, mean 3
    empty = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    weights = torch.tensor([[1.0, 2.0]])
    expected = {
        "a1111": torch.tensor([[[1.0, 2.0], [6.0, 12.0]]]) * 3 / 5.25,
        "comfy": torch.tensor([[[1.0, 2.0], [5.0, 10.0]]]),
        "fooocus": torch.tensor([[[1.0, 2.0], [5.0, 10.0]]]) * 3 / 4.5,
    }
    for name, weigh in EMPHASIS.items():
        assert torch.allclose(weigh(z, empty, weights), expected[name])
        assert torch.equal(weigh(z, empty, torch.ones(1, 2)), z)


def test_a_mean_of_zero_is_no_division_by_zero():
    """As behind a norm without a bias, which networks with random weights have."""
    z, weights = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]]), torch.tensor([[1.0, 2.0]])
    for weigh in EMPHASIS.values():
        assert torch.equal(weigh(z, torch.zeros(2, 2), weights), torch.tensor([[[1.0, -1.0], [4.0, -4.0]]]))


def test_each_chunk_has_its_own_mean():
    torch.manual_seed(0)
    z, empty, weights = torch.randn(3, 5, 4), torch.randn(5, 4), torch.rand(3, 5) + 0.5
    for weigh in EMPHASIS.values():
        alone = [weigh(z[k : k + 1], empty, weights[k : k + 1])[0] for k in range(3)]
        assert torch.allclose(weigh(z, empty, weights), torch.stack(alone), atol=1e-6)


@pytest.mark.parametrize("name", EMPHASIS)
@torch.no_grad()
def test_weights_reach_the_context_and_nothing_else(tokenizer, name):
    plain, weighted = make(tokenizer, pooled=True), make(tokenizer, pooled=True, emphasis=name)
    prompt, text = "a (red:1.5) cat", "a red cat"
    cond, expected = weighted([prompt, text, ""], CPU), plain([text, ""], CPU)
    assert torch.equal(cond["context"][1:], expected["context"])  # beside a weighted one, and bit for bit
    assert torch.equal(weighted(["(a (red:1) cat:1)"], CPU)["context"], expected["context"][:1])
    assert torch.equal(cond["pooled"][0], expected["pooled"][0])
    red = tokenizer.encode([text])[0, 0].tolist().index(tokenizer.ids("red")[0])
    weights = torch.ones(1, 77)
    weights[0, red] = 1.5
    z, empty = expected["context"]
    assert torch.allclose(cond["context"][0], EMPHASIS[name](z[None], empty, weights)[0], atol=1e-5)
    assert (cond["context"][0, red] - z[red]).abs().max() > 1e-2


def test_without_emphasis_brackets_are_text(tokenizer):
    encoder = make(tokenizer)
    ids = tokenizer.ids("a (red:1.5) cat")
    assert len(ids) > 3 and encoder._tokenize("a (red:1.5) cat") == (ids, (1.0,) * len(ids))
    encoder.emphasis = "comfy"
    ids = tokenizer.ids("a red cat")
    assert encoder._tokenize("a (red:1.5) cat") == (ids, (1.0, 1.5, 1.0))
    with pytest.raises(ConfigError, match="emphasis is 'compel', expected null or one of: a1111, comfy, fooocus"):
        encoder.emphasis = "compel"


@torch.no_grad()
def test_weights_continue_in_the_next_chunk(tokenizer):
    encoder = make(tokenizer, emphasis="comfy")
    prompt = "cat " * 74 + "(red red:1.4)"
    weights = encoder._frame([prompt])[0][1]
    assert [index for index, weight in enumerate(weights) if weight != 1] == [75, 78] and len(weights) == 154
    context = encoder([prompt], CPU)["context"]
    second = make(tokenizer, emphasis="comfy")(["(red:1.4)"], CPU)["context"]
    assert torch.allclose(context[:, 77:], second, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- lengths


@torch.no_grad()
def test_as_many_chunks_as_the_longest_prompt_needs(tokenizer):
    encoder = make(tokenizer, pooled=True)
    lengths = [encoder([n * "cat ", ""], CPU)["context"].shape[1] // 77 for n in (0, 1, 75, 76, 225, 226)]
    assert lengths == [1, 1, 1, 2, 3, 4]
    long, short = encoder(["cat " * 80, "a red cat"], CPU)["context"]
    alone = encoder(["a red cat"], CPU)["context"][0]
    assert torch.allclose(short[:77], alone, atol=1e-5)
    assert torch.allclose(short[77:], encoder([""], CPU)["context"][0], atol=1e-5)
    assert make(tokenizer, chunks=2)(["cat"], CPU)["context"].shape[1] == 154
    with pytest.raises(ConfigError, match="max_chunks 0; expected at least 1"):
        make(tokenizer, max_chunks=0)


@torch.no_grad()
def test_endless_prompts_are_cut_with_one_line(tokenizer, caplog):
    encoder = make(copy.deepcopy(tokenizer), max_chunks=2)
    cond = encoder(["cat " * 150 + "red " * 9850, "red " * 400], CPU)
    assert cond["context"].shape == (2, 154, 32)
    assert torch.allclose(cond["context"][:1], encoder(["cat " * 150], CPU)["context"], atol=1e-5)
    (record,) = caplog.records
    assert record.message == f"prompt of 10000 tokens cut to 150, lost {'red ' * 15!r}...; 134 chunks of 75 hold it all"


def test_what_is_not_text(tokenizer):
    for value in (3, ["a"], None):
        with pytest.raises(DataError, match="expected text"):
            make(tokenizer)([value], CPU)
        with pytest.raises(DataError, match="expected text"):
            make(tokenizer, emphasis="comfy")([value], CPU)


# ---------------------------------------------------------------------------------------------------------- memory


class Counted:
    """Counts the texts that reach the network of an encoder."""

    def __init__(self, encoder):
        self.texts = 0
        encoder.network.register_forward_hook(lambda module, args, out: setattr(self, "texts", self.texts + len(out)))

    def during(self, call):
        before = self.texts
        call()
        return self.texts - before


def test_known_prompts_are_not_read_again(tokenizer):
    encoder = make(tokenizer, pooled=True)
    counted = Counted(encoder)
    texts = ["a cat", "a red cat", "a cat"]
    with torch.no_grad():
        first = encoder(texts, CPU)
        assert counted.texts == 2
        again = encoder([*texts, "photo"], CPU)
        assert counted.texts == 3
        assert all(torch.equal(first[name], again[name][:3]) for name in first)
        again["context"].zero_()  # what is given out is the caller's
        assert torch.equal(encoder(texts, CPU)["context"], first["context"]) and counted.texts == 3
        encoder.emphasis = "comfy"
        assert counted.during(lambda: encoder(["a cat"], CPU)) == 1
    assert torch.equal(first["context"], make(tokenizer)(texts, CPU)["context"])
    assert encoder.state_dict().keys() == make(tokenizer).state_dict().keys()


def test_memory_is_only_for_networks_that_are_not_trained(tokenizer):
    encoder = make(tokenizer)
    counted = Counted(encoder)
    for _ in range(2):
        encoder(["a cat"], CPU)["context"].sum().backward()
    assert counted.texts == 2 and not encoder.memory.rows
    encoder.requires_grad_(False)
    assert counted.during(lambda: [encoder(["a cat"], CPU) for _ in range(3)]) == 1
    encoder.train()
    assert counted.during(lambda: [encoder(["a cat"], CPU) for _ in range(3)]) == 3


@torch.no_grad()
def test_changed_weights_are_noticed(tokenizer):
    encoder = make(tokenizer)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    old = encoder(["a cat"], CPU)["context"]
    encoder.network.blocks[1].mlp.fc1.bias.add_(0.5)
    assert not torch.allclose(encoder(["a cat"], CPU)["context"], old, atol=1e-3)
    encoder.load_state_dict(state)
    assert torch.equal(encoder(["a cat"], CPU)["context"], old)
    encoder.load_state_dict({name: value + 0.1 for name, value in state.items()}, assign=True)
    assert not torch.allclose(encoder(["a cat"], CPU)["context"], old, atol=1e-3)
    assert encoder.bfloat16()(["a cat"], CPU)["context"].dtype == torch.bfloat16
    assert not make(tokenizer).to("meta").network.positions.is_cpu


def test_memory_is_bounded_and_copies_are_empty(tokenizer):
    encoder = make(tokenizer).requires_grad_(False)
    encoder.memory = Memory(size=3)
    counted = Counted(encoder)
    encoder(["a", "b", "c", "d"], CPU)  # a call larger than the memory works, and the last three stay
    assert len(encoder.memory.rows) == 3
    assert counted.during(lambda: encoder(["b"], CPU)) == 0
    assert counted.during(lambda: encoder(["e"], CPU)) == 1
    assert counted.during(lambda: encoder(["b", "d"], CPU)) == 0 and counted.during(lambda: encoder(["c"], CPU)) == 1
    for other in (copy.deepcopy(encoder.memory), pickle.loads(pickle.dumps(encoder.memory))):
        assert other.size == 3 and not other.rows


def test_recalled_in_inference_mode_then_trained_on(tokenizer):
    encoder = make(tokenizer).requires_grad_(False)
    with torch.inference_mode():
        encoder(["a cat"], CPU)
    weight = torch.ones(32, requires_grad=True)
    (encoder(["a cat"], CPU)["context"] * weight).sum().backward()
    assert weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------- sizes


def test_sizes_and_score_join_in_the_refiners_order():
    batch = {"size": torch.tensor([[512, 768, 0, 10, 1024, 1024], [1, 2, 3, 4, 5, 6]])}
    base = Conditioner({"size": Sizes()}, dropout={})
    assert base.dims == {"num_sizes": 6}
    cond, null = base.pair(batch)
    assert cond["size"].dtype == torch.float32 and torch.equal(cond["size"], batch["size"].float())
    assert torch.equal(null["size"], cond["size"])  # guidance keeps the sizes
    refiner = Conditioner({"size": Sizes(4), "aesthetic": AestheticScore()}, dropout={}, join=["size"])
    assert refiner.dims == {"num_sizes": 5}
    cond, null = refiner.pair(batch)
    assert cond["size"].tolist() == [[512, 768, 0, 10, 6], [1, 2, 3, 4, 6]]
    assert null["size"].tolist() == [[512, 768, 0, 10, 2.5], [1, 2, 3, 4, 2.5]]
    scored = refiner(batch | {"aesthetic": torch.tensor([4.5, 7.0])})
    assert scored["size"][:, 4].tolist() == [4.5, 7.0]


def test_sizes_that_are_none():
    for value in ([1, 2, 3], 5, None, [[1, 2, 3, 4, 5, 6]], ["a"] * 6):
        with pytest.raises(DataError, match="size is .*, expected original height, width, crop top, left"):
            Sizes()([value], CPU)
    with pytest.raises(ConfigError, match="count is 7, expected 1 to 6"):
        Sizes(7)
    with pytest.raises(DataError, match=r"aesthetic scores are \[None\], expected a number"):
        AestheticScore()([None], CPU)
