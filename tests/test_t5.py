"""T5 without a judge: published sizes, buckets, masks and padding, half precision, names in files."""

import pytest
import torch

from ldm.build import build_conditioner, compose, make
from ldm.conditioning import t5
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.stored import StoredEncoder
from ldm.conditioning.t5 import T5Encoder, T5TextEncoder, bucket
from ldm.conditioning.t5_tokenizer import T5Tokenizer
from ldm.nn.attention import attention
from ldm.tools.precompute import Pass, store_texts
from ldm.utils.errors import ConfigError, DataError, WeightsError
from ldm.weights.t5 import arguments, from_config, from_shapes, from_transformers, to_config, to_transformers
from tests.test_t5_tokenizer import KINDS, toy_model, toy_vocabulary

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return T5Tokenizer(toy_vocabulary(), 2, KINDS)


def network(tokenizer, seed=0, **knobs):
    torch.manual_seed(seed)
    sizes = {"width": 32, "depth": 3, "num_heads": 3, "head_dim": 16, "mlp_dim": 40} | knobs
    net = T5Encoder(**sizes, vocab_size=len(tokenizer) + 4)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------- sizes and buckets


@pytest.mark.parametrize(
    "name, count",
    [
        ("t5_small", 35_332_800),
        ("t5_base", 109_628_544),
        ("t5_large", 341_231_104),
        ("t5_xl", 1_223_527_424),
        ("t5_xxl", 4_762_310_656),
        ("mt5_small", 146_940_608),
        ("mt5_base", 277_040_256),
        ("mt5_large", 564_446_720),
        ("mt5_xl", 1_669_958_656),
        ("mt5_xxl", 5_655_173_120),
    ],
)
def test_shipped_configs_have_the_published_sizes(name, count):
    node = compose("train", [f"network={name}"])["network"]
    with torch.device("meta"):
        net = make(node, "network")
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    assert arguments(net) == {key: value for key, value in node.items() if key != "_target_"}
    assert from_config(to_config(net)) == arguments(net)
    shapes = {key: tuple(value.shape) for key, value in to_transformers(net.state_dict()).items()}
    assert from_shapes(shapes) == arguments(net)


def test_buckets_of_distances():
    golden = {-128: 15, -64: 14, -20: 10, -16: 10, -12: 9, -9: 8, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17, 7: 23, 8: 24, 9: 24,
              12: 25, 16: 26, 20: 26, 64: 30, 127: 31, 5000: 31}  # fmt: skip
    assert bucket(torch.tensor(list(golden))).tolist() == list(golden.values())
    for distance in range(8, 400):  # in whole numbers: 8 * 16^(k / 8) <= distance
        k = sum(distance**2 >= 64 * 2**k for k in range(1, 8))
        assert int(bucket(torch.tensor(-distance))) == 8 + k


def test_bias_is_stored_once_and_scores_are_not_scaled(tokenizer):
    net = network(tokenizer, depth=2)
    assert [key for key in net.state_dict() if "table" in key] == ["position.table"]
    ids = torch.randint(0, len(tokenizer), (2, 9))
    x, position = net.tokens(ids), torch.arange(9)
    rows = [[int(bucket(key - query)) for key in position] for query in position]
    bias = net.position.table[torch.tensor(rows)].permute(2, 0, 1)  # H L L
    for block in net.blocks:
        q, k, v = (y.unflatten(-1, (3, 16)).transpose(1, 2) for y in block.attention.qkv(block.norm1(x)).chunk(3, -1))
        x = x + block.attention.out(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))
        gate, value = block.mlp.wi(block.norm2(x)).chunk(2, -1)
        x = x + block.mlp.wo(torch.nn.functional.gelu(gate, approximate="tanh") * value)
    rms = x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    assert torch.allclose(net(ids), x / rms * net.norm.weight, atol=2e-5)


def test_attention_takes_a_scale_and_a_mask_of_numbers():
    q, k, v = torch.randn(3, 2, 300, 32).unbind()  # long enough for the blockwise kernel, which has neither
    bias = torch.randn(2, 4, 300, 300)
    heads = [x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (q, k, v)]
    scores = 0.7 * heads[0] @ heads[1].mT
    for mask, expected in [(None, scores), (bias, scores + bias)]:
        expected = (expected.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
        assert torch.allclose(attention(q, k, v, 4, mask, scale=0.7), expected, atol=1e-5)


# -------------------------------------------------------------------------------------- padding, lengths, precision


def test_who_sees_the_padding(tokenizer):
    net = network(tokenizer)
    encoders = {
        (mask, context_mask): T5TextEncoder(net, tokenizer, 24, mask, context_mask)
        for mask in (True, False)
        for context_mask in (True, False)
    }
    texts = ["a cat", "a red photo of a red cat", ""]
    conds = {how: encoder(texts, CPU) for how, encoder in encoders.items()}
    ids, mask = tokenizer.encode(texts, 24)
    for (hidden, given), cond in conds.items():
        assert cond["context"].shape == (3, 24, 32) and (cond.keys() == {"context", "context_mask"}) == given
        assert not given or torch.equal(cond["context_mask"], mask)
        expected = net(ids, mask if hidden else None)
        seen = cond["context"][mask] if given else cond["context"]
        assert torch.allclose(seen, expected[mask] if given else expected, atol=1e-5)
    assert not conds[True, True]["context"][~mask].any()  # what nobody reads is not computed
    assert (conds[True, False]["context"][~mask]).all() and mask.sum(-1).tolist() == [3, 8, 1]
    alone = net(ids[:1, :3])
    assert torch.allclose(conds[True, True]["context"][:1, :3], alone, atol=1e-5)
    assert not torch.allclose(conds[False, True]["context"][:1, :3], alone, atol=1e-2)


def test_text_k_of_a_batch_is_the_text_alone_and_the_null_is_the_empty_text(tokenizer):
    encoder = T5TextEncoder(network(tokenizer), tokenizer, 20)
    conditioner = Conditioner({"t5": encoder})
    batch = {"caption": ["a cat", "a red photo of a red cat", "a cat"]}
    cond, null = conditioner.pair(batch)
    for k, text in enumerate(batch["caption"]):
        alone = encoder([text], CPU)
        assert torch.allclose(alone["context"][0], cond["context"][k], atol=1e-5)
        assert torch.equal(alone["context_mask"][0], cond["context_mask"][k])
    assert null["context_mask"].tolist() == [[True] + [False] * 19] * 3
    assert torch.allclose(null["context"], encoder([""], CPU)["context"], atol=1e-5)
    assert conditioner.dims == {"context_dim": 32}


def test_a_frozen_encoder_reads_a_text_once_within_its_memory(tokenizer, monkeypatch):
    net = network(tokenizer)
    calls = []
    net.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    encoder = T5TextEncoder(net, tokenizer, 16)
    first = encoder(["a cat", "", "a cat"], CPU)
    again = encoder(["", "a red cat", "a cat"], CPU)
    assert calls == [2, 1] and torch.equal(first["context"][0], again["context"][2])
    assert first["context_mask"].dtype == again["context_mask"].dtype == torch.bool
    monkeypatch.setattr(t5, "MEMORY_BYTES", 5 * 4 * 16 * 32)
    assert T5TextEncoder(net, tokenizer, 16).memory.size == 5
    encoder.requires_grad_(True)
    encoder(["a cat"], CPU)["context"].sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("length", [1, 2, 7, 130])
def test_any_length(tokenizer, length):
    net = network(tokenizer)
    ids = torch.randint(3, len(tokenizer), (2, length))
    out = net(ids, torch.ones(2, length, dtype=torch.bool))
    assert out.shape == (2, length, 32) and torch.allclose(out, net(ids), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives_what_overflows_float16(tokenizer, dtype):
    """Trap: T5 was trained in bfloat16; what its feed-forward layers add reaches 3e5, float16 ends at 65504."""
    net = network(tokenizer)
    ids, mask = tokenizer.encode(["a red photo of a cat", "cat"], 12)
    largest = []
    net.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: largest.append(output.abs().max()))
    net(ids, mask)
    for block in net.blocks:
        block.mlp.wo.weight *= 3e5 / largest[0]
    exact = net(ids, mask)
    out = net.to(dtype)(ids, mask)
    assert largest[2] > 2.9e5 and out.dtype == dtype
    assert (out.float() - exact).abs().max() < (0.1 if dtype == torch.bfloat16 else 0.02) * exact.abs().max()


def test_autocast(tokenizer):
    encoder = T5TextEncoder(network(tokenizer), tokenizer, 12)
    exact = encoder(["a red cat"], CPU)["context"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(["a red cat"], CPU)["context"]
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_clean_is_a_knob(tokenizer):
    net = network(tokenizer)
    plain, clean = (T5TextEncoder(net, tokenizer, 12, clean=clean) for clean in (False, True))
    assert torch.equal(plain(["a red cat"], CPU)["context"], clean(["A RED cat www.x.com"], CPU)["context"])
    assert plain(["A RED cat"], CPU)["context_mask"].sum() != clean(["A RED cat"], CPU)["context_mask"].sum()


def test_shipped_conditioner_is_rebuilt_from_its_checkpoint_alone(tmp_path):
    (tmp_path / "spiece.model").write_bytes(toy_model())
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 8, "vocab_size": 200}
    overrides = [f"conditioner.encoders.t5.network.{name}={size}" for name, size in sizes.items()]
    overrides += ["conditioner=t5", f"conditioner.tokenizer.path={tmp_path / 'spiece.model'}"]
    first, node, files = build_conditioner(compose("train", overrides)["conditioner"])
    (tmp_path / "spiece.model").unlink()
    again, _, _ = build_conditioner(node, tokenizer=files["tokenizer.json"].decode())
    again.load_state_dict(first.state_dict())
    batch = {"caption": ["A red cat www.x.com", ""]}
    cond = first(batch)
    assert cond["context"].shape == (2, 120, 16) and cond["context_mask"].sum(-1).tolist() == [4, 1]
    assert all(torch.equal(value, again(batch)[name]) for name, value in cond.items())


def test_impossible_knobs(tokenizer):
    with pytest.raises(ConfigError, match="length is 1, expected at least 2"):
        T5TextEncoder(network(tokenizer), tokenizer, 1)
    with pytest.raises(ConfigError, match="vocabulary of .* ids, the network knows 9"):
        T5TextEncoder(T5Encoder(8, 1, 1, 8, 8, vocab_size=9), tokenizer)
    with pytest.raises(DataError, match="caption None is NoneType, expected text"):
        T5TextEncoder(network(tokenizer), tokenizer)([None], CPU)
    with pytest.raises(DataError, match="caption None is NoneType, expected text"):
        T5TextEncoder(network(tokenizer), tokenizer, clean=True)([None], CPU)


# ------------------------------------------------------------------------------------------------------------- names


def test_round_trip_is_bit_exact_whatever_the_table_is_called(tokenizer):
    state = network(tokenizer).half().state_dict()
    theirs = to_transformers(state)
    assert "encoder.embed_tokens.weight" not in theirs and len(theirs) == 3 + 9 * 3
    table = theirs["shared.weight"]
    both = theirs | {"encoder.embed_tokens.weight": table}
    other = {key: value for key, value in both.items() if key != "shared.weight"}
    whole = both | {"decoder.block.0.layer.0.layer_norm.weight": table, "lm_head.weight": table}
    for published in (theirs, both, other, whole):
        ours = from_transformers(published, state)
        assert ours.keys() == state.keys() and all(torch.equal(ours[key], state[key]) for key in state)
        again = to_transformers(ours)
        assert again.keys() == theirs.keys() and all(torch.equal(again[key], theirs[key]) for key in theirs)
    with pytest.raises(WeightsError, match="shared.weight and encoder.embed_tokens.weight differ"):
        from_transformers(theirs | {"encoder.embed_tokens.weight": table + 1}, state)
    with pytest.raises(WeightsError, match="missing 1 .encoder.embed_tokens.weight.; unknown none"):
        from_transformers({key: value for key, value in theirs.items() if key != "shared.weight"}, state)
    with pytest.raises(WeightsError, match="missing none; unknown 9 .encoder.block.2.layer.0.Self"):
        from_transformers(theirs, network(tokenizer, depth=2).state_dict())


def test_other_members_of_the_family_are_refused():
    published = {"model_type": "t5", "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    assert from_config(published | {"feed_forward_proj": "gated-gelu"})["vocab_size"] == 32128
    assert from_config({"model_type": "mt5"})["num_heads"] == 6
    for change, words in [
        ({}, "feed_forward_proj=relu"),  # T5 v1.0
        ({"model_type": "umt5"}, "model_type='umt5', expected one of: t5, mt5"),
        ({"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
    ]:
        with pytest.raises(WeightsError, match=words):
            from_config(published | change)


def test_texts_are_stored_with_their_masks_and_training_reads_them_from_there(tokenizer, tmp_path, monkeypatch):
    encoder = T5TextEncoder(network(tokenizer).requires_grad_(False).eval(), tokenizer, length=12)
    texts = ["a red circle", "a blue square", ""]
    how = Pass(2, 0, CPU, torch.float32)
    stored = StoredEncoder(encoder, store_texts(encoder, "t5", texts[:2], tmp_path, how, {}))
    expected = encoder(texts, CPU)
    monkeypatch.setattr(encoder, "forward", None)  # read from now on, not encoded
    found = stored(texts, CPU)
    assert found["context_mask"].dtype == torch.bool and found["context_mask"].equal(expected["context_mask"])
    torch.testing.assert_close(found["context"], expected["context"])
