"""Conditioning: what is dropped, what null means, and that a caption's embedding is its own business."""

import logging
import pickle

import pytest
import torch

from ldm.conditioning import tokenizers
from ldm.conditioning.conditioner import Conditioner, Encoder
from ldm.conditioning.labels import ClassLabels
from ldm.conditioning.sizes import AestheticScore, SizeAndRatio, Sizes
from ldm.conditioning.text_transformer import TextTransformer
from ldm.conditioning.tokenizers import Tokenizer, train_bpe, train_words
from ldm.utils.errors import CheckpointError, ConfigError, DataError

CAPTIONS = ["a red circle", "a blue square", "a small red star left of a blue circle", "Two green squares."]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(tokenizers, "_warned", set())


@pytest.fixture(scope="module")
def words():
    return train_words(CAPTIONS)


def text_encoder(words, **knobs) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(words, **({"width": 32, "depth": 2, "head_dim": 16, "max_length": 12} | knobs)).eval()


def batch(count: int, **fields) -> dict:
    return {"position": torch.arange(count), **fields}


# ------------------------------------------------------------------------------------------------------- tokenizer


def test_text_is_framed_padded_and_masked(words):
    ids, mask = words.encode(["a red circle", ""], max_length=6)
    assert ids.shape == mask.shape == (2, 6) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids[0, 0] == words.bos and ids[0, 4] == words.eos and ids[0, 5] == words.pad
    assert ids[1].tolist() == [words.bos, words.eos] + [words.pad] * 4
    assert mask.tolist() == [[True] * 5 + [False], [True] * 2 + [False] * 4]
    assert words.encode([], max_length=6)[0].shape == (0, 6)


def test_case_does_not_matter_and_punctuation_is_a_token(words):
    ids, _ = words.encode(["A RED circle", "a red circle", "squares .", "Squares."], max_length=8)
    assert ids[0].equal(ids[1]) and ids[2].equal(ids[3])


def test_unknown_words_are_unk_and_named_once(words, caplog):
    ids, _ = words.encode(["a purple circle", "a crimson circle"], max_length=6)
    assert (ids == words.unk).sum(1).tolist() == [1, 1]
    assert [record.message for record in caplog.records] == [
        "word 'purple' was not in the training captions; it is read as [UNK]"
    ]


def test_special_tokens_in_a_caption_are_plain_text(words):
    ids, mask = words.encode(["[PAD] [EOS] red"], max_length=16)
    assert (ids == words.eos).sum() == 1 and mask[0].int().diff().abs().sum() == 1


@pytest.mark.parametrize("train", [train_words, train_bpe])
def test_long_text_is_cut_with_one_warning_naming_the_lost_words(train, caplog):
    tokenizer = train(CAPTIONS * 2, vocab_size=400)
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer.encode([CAPTIONS[2], CAPTIONS[2] + " a red star"], max_length=6)
    assert ids.shape == (2, 6) and mask.all() and (ids[:, -1] == tokenizer.eos).all()
    assert len(caplog.records) == 1 and "lost 'left of a blue circle'" in caplog.records[0].message


def test_exactly_full_text_is_not_cut(words, caplog):
    words.encode(["a red circle"], max_length=5)
    assert not caplog.records


@pytest.mark.parametrize("train", [train_words, train_bpe])
def test_json_round_trip_keeps_every_id(train):
    tokenizer = train(CAPTIONS, vocab_size=400)
    copies = [Tokenizer.from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))]
    for copy in copies:
        assert copy.to_json() == tokenizer.to_json() and len(copy) == len(tokenizer)
        assert copy.encode(CAPTIONS, 40)[0].equal(tokenizer.encode(CAPTIONS, 40)[0])


@pytest.mark.parametrize("train", [train_words, train_bpe])
def test_training_is_deterministic_and_the_specials_come_first(train):
    first, again = train(CAPTIONS, vocab_size=400), train(iter(CAPTIONS), vocab_size=400)
    assert first.to_json() == again.to_json()
    assert (first.pad, first.unk, first.bos, first.eos) == (0, 1, 2, 3)


def test_bpe_has_no_unknown_words():
    tokenizer = train_bpe(CAPTIONS, vocab_size=300)
    ids, _ = tokenizer.encode(["a púrple ☃ 圆"], max_length=40)
    assert tokenizer.unk not in ids


def test_vocab_size_keeps_the_frequent_words():
    tokenizer = train_words(["a a a b b c"], vocab_size=6)
    assert len(tokenizer) == 6
    assert (tokenizer.encode(["a b c"], 5)[0] == tokenizer.unk).tolist() == [[False, False, False, True, False]]


def test_tokenizer_refuses_what_is_not_text_or_not_a_tokenizer(words):
    with pytest.raises(DataError, match="None is NoneType"):
        words.encode([None], max_length=6)
    with pytest.raises(DataError, match="no captions"):
        train_words(["", " "])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_json(words.to_json()[:-20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_json(words.to_json().replace('"unk_token":"[UNK]"', '"unk_token":"[XXX]"'))
    with pytest.raises(CheckpointError, match="lacks \\[EOS\\]"):
        Tokenizer.from_json(words.to_json().replace("[EOS]", "[END]"))


# ------------------------------------------------------------------------------------------------ text transformer


def test_context_shapes_and_dims(words):
    encoder = text_encoder(words, pooled=True)
    cond = encoder(CAPTIONS, CPU)
    assert cond["context"].shape == (4, 12, 32) and cond["context_mask"].shape == (4, 12)
    assert cond["pooled"].shape == (4, 32) and encoder.dims == {"context_dim": 32, "pooled_dim": 32}
    assert text_encoder(words).dims == {"context_dim": 32}


def test_a_caption_in_a_batch_equals_the_caption_alone(words):
    encoder = text_encoder(words, pooled=True)
    together = encoder(CAPTIONS + [""], CPU)
    for k, caption in enumerate(CAPTIONS + [""]):
        alone = encoder([caption], CPU)
        for name in ("context", "pooled"):
            torch.testing.assert_close(together[name][k], alone[name][0], rtol=1e-5, atol=1e-5)


def test_padding_is_invisible(words):
    short, long = text_encoder(words, max_length=8, pooled=True), text_encoder(words, max_length=12, pooled=True)
    weights = long.state_dict()
    short.load_state_dict({**weights, "positions": weights["positions"][:8]})
    a, b = short(["a red circle"], CPU), long(["a red circle"], CPU)
    torch.testing.assert_close(a["context"][:, :5], b["context"][:, :5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a["pooled"], b["pooled"], rtol=1e-5, atol=1e-5)


def test_word_order_matters(words):
    context = text_encoder(words, pooled=True)(["red circle blue square", "blue circle red square"], CPU)["pooled"]
    assert (context[0] - context[1]).abs().max() > 1e-3


def test_every_parameter_gets_a_gradient_and_padding_rows_get_none(words):
    encoder = text_encoder(words, pooled=True)
    cond = encoder(["a red circle"], CPU)
    (cond["context"][cond["context_mask"]].square().sum() * 0.5 + cond["pooled"].sum()).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert not encoder.positions.grad[5:].any() and not encoder.tokens.weight.grad[words.pad].any()
    assert encoder.positions.grad[:5].any()


def test_text_transformer_refuses_impossible_sizes(words):
    with pytest.raises(ConfigError, match="width 33"):
        text_encoder(words, width=33)
    with pytest.raises(ConfigError, match="max_length is 2"):
        text_encoder(words, max_length=2)


# ----------------------------------------------------------------------------------------------------------- labels


def test_labels_by_id_by_name_and_null():
    encoder = ClassLabels(3, ["cat", "dog", "1"])
    assert encoder([0, "dog", "2", 3, "", "1"], CPU)["labels"].tolist() == [0, 1, 2, 3, 3, 2]
    assert encoder.null == 3 and encoder.dims == {"num_classes": 3}
    assert ClassLabels(10)([9, "7"], CPU)["labels"].dtype == torch.int64
    encoder = ClassLabels(2, ["tench, Tinca tinca", "cock"])  # as ImageNet's
    assert encoder(["Tinca tinca", "tench, Tinca tinca", "cock"], CPU)["labels"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("label", [-1, 4, "cow", "-1", 1.5])
def test_labels_that_are_no_class(label):
    with pytest.raises(DataError, match="expected 0..2, 3 for none, or a name such as cat, dog, bird"):
        ClassLabels(3, ["cat", "dog", "bird"])([label], CPU)


def test_class_names_must_fit():
    with pytest.raises(ConfigError, match="num_classes is 3, expected 2"):
        ClassLabels(3, ["cat", "dog"])


# ------------------------------------------------------------------------------------------------------ conditioner


class Echo(Encoder):
    """Gives back the numbers it is given, so that a test sees what was dropped."""

    null, dims = -1, {}

    def __init__(self, field: str, gives: str):
        super().__init__()
        self.field, self.gives = field, gives

    def forward(self, values, device):
        return {self.gives: torch.tensor(values, device=device)}


def two_echoes(dropout) -> Conditioner:
    return Conditioner({"a": Echo("x", "out_a"), "b": Echo("y", "out_b")}, dropout)


def test_without_a_key_nothing_is_dropped_and_with_one_the_draw_is_fixed(words):
    conditioner = Conditioner({"text": text_encoder(words), "labels": ClassLabels(5)}, dropout=0.5)
    data = batch(64, caption=["a red circle"] * 64, label=torch.arange(64) % 5)
    plain = conditioner(data)
    assert plain["labels"].equal(data["label"])
    once, again, other = conditioner(data, key=1), conditioner(data, key=1), conditioner(data, key=2)
    assert all(once[name].equal(again[name]) for name in once) and not once["labels"].equal(other["labels"])
    assert set(plain) == {"context", "context_mask", "labels"} and conditioner.fields == {"caption", "label"}
    assert conditioner.dims == {"context_dim": 32, "num_classes": 5}


def test_dropped_inputs_equal_null(words):
    conditioner = Conditioner({"text": text_encoder(words, pooled=True), "labels": ClassLabels(5)}, dropout=1.0)
    dropped = conditioner(batch(3, caption=CAPTIONS[:3], label=torch.tensor([0, 1, 2])), key=0)
    _, null = conditioner.pair({"caption": CAPTIONS[:3], "label": [0, 1, 2]})
    assert all(dropped[name].equal(null[name]) for name in null) and dropped.keys() == null.keys()
    assert null["labels"].tolist() == [5] * 3 and null["context_mask"].any(1).all()


def test_drop_frequencies_and_independence():
    n = 20000
    cond = two_echoes({"a": 0.1, "b": 0.3})(batch(n, x=[0] * n, y=[0] * n), key=7)
    a, b = (cond[name] == -1 for name in ("out_a", "out_b"))
    assert a.float().mean().item() == pytest.approx(0.1, abs=0.01)  # 4.7 standard deviations
    assert b.float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert (a & b).float().mean().item() == pytest.approx(0.03, abs=0.006)


def test_drops_belong_to_the_position_not_to_the_batch():
    conditioner = two_echoes(0.5)
    whole = conditioner({"position": torch.arange(32), "x": torch.arange(32), "y": torch.arange(32)}, key=3)
    part = conditioner({"position": torch.arange(8, 20), "x": torch.arange(8, 20), "y": torch.arange(8, 20)}, key=3)
    assert whole["out_a"][8:20].equal(part["out_a"]) and whole["out_b"][8:20].equal(part["out_b"])


def test_dropout_by_name_leaves_the_others():
    cond = two_echoes({"a": 1.0})(batch(9, x=[0] * 9, y=[0] * 9), key=0)
    assert (cond["out_a"] == -1).all() and (cond["out_b"] == 0).all()


def test_empty_conditioner_is_unconditional():
    conditioner = Conditioner({})
    assert conditioner({"image": None}) == conditioner({}, key=1) == {} and conditioner.pair({}) == ({}, {})
    assert conditioner.dims == {} and conditioner.fields == set()


def test_a_pair_is_the_conditions_with_and_without():
    conditioner = two_echoes(0.5)
    cond, null = conditioner.pair({"x": [1, 2], "y": [3, 4]})
    assert cond["out_a"].tolist() == [1, 2] and null["out_a"].tolist() == null["out_b"].tolist() == [-1, -1]
    _, null = conditioner.pair({"x": [1, 2], "y": [3, 4]}, x=[7, 8])
    assert null["out_a"].tolist() == [7, 8] and null["out_b"].tolist() == [-1, -1]


def test_joined_conditions_lie_side_by_side_and_a_default_stands_in_for_a_field():
    conditioner = Conditioner({"size": Sizes(4), "score": AestheticScore(6.0, 2.5)}, dropout=0, join=["size"])
    cond, null = conditioner.pair({"size": torch.tensor([[512, 640, 0, 64, 512, 512]])})
    assert conditioner.dims == {"num_sizes": 5}
    assert cond["size"].tolist() == [[512, 640, 0, 64, 6.0]] and null["size"].tolist() == [[512, 640, 0, 64, 2.5]]
    with pytest.raises(ConfigError, match="what can be joined is context, pooled, size"):
        Conditioner({}, join=["labels"])


def test_the_size_and_the_ratio_stay_where_guidance_takes_the_text_away():
    conditioner = Conditioner({"size": SizeAndRatio()}, dropout=0)
    assert conditioner.dims == {"num_sizes": 3}
    cond, null = conditioner.pair({"size": [(600, 900, 0, 10, 512, 1024), (64, 64, 0, 0, 96, 64)]})
    assert cond["size"].tolist() == [[600, 900, 0.5], [64, 64, 1.5]] and torch.equal(cond["size"], null["size"])
    with pytest.raises(DataError, match="expected original height, width, .* target height"):
        conditioner({"size": [(600, 900)]})


def test_conditioner_says_what_is_wrong(words):
    with pytest.raises(ConfigError, match="'b' gives context_dim, as does another"):
        Conditioner({"a": text_encoder(words), "b": text_encoder(words)})
    with pytest.raises(ConfigError, match="'b' gives out, as does another"):
        Conditioner({"a": Echo("x", "out"), "b": Echo("x", "out")})({"x": [1]})
    with pytest.raises(ConfigError, match="dropout for c, expected one of: a, b"):
        two_echoes({"c": 0.1})
    with pytest.raises(ConfigError, match="dropout of a is 10"):
        two_echoes({"a": 10})
    with pytest.raises(DataError, match="encoder 'a' reads 'x' but the data has only image, position"):
        two_echoes(0.1)(batch(1, image=None))


def test_conditions_are_made_where_the_conditioner_lives(words):
    conditioner = Conditioner({"text": text_encoder(words), "labels": ClassLabels(5)}).to("meta")
    assert {tensor.device.type for tensor in conditioner({"caption": [""], "label": [0]}).values()} == {"meta"}
    assert not any("_device" in name for name in conditioner.state_dict())
