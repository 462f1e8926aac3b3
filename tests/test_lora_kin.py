"""Files of LoRA's kin as people have them: biases, scalars, sparse parts, rotations, names, and what is refused."""

import pytest
import torch

from ldm.adapters.lora import Loaded
from ldm.adapters.lora_formats import read_lora
from ldm.adapters.lora_kinds import LowRank
from ldm.adapters.lora_relative import Rotation
from ldm.utils.errors import WeightsError
from ldm.weights.controlnet import other_kind
from tests.test_lora_formats import CONV, NORM, QKV, Q, draw, factors, kohya, text, unet, write

A, B = factors()
LORA = {"lora_down.weight": A, "lora_up.weight": B}
FC1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


def of(name, **tensors):
    return {f"{kohya(name)}.{key.replace('__', '.')}": tensor for key, tensor in tensors.items()}


def lora(name=Q, **more):
    return of(name, lora_down__weight=A, lora_up__weight=B, **more)


@pytest.fixture(scope="module")
def base():
    """One network for those that only read; its layer's own weight."""
    net = unet()
    return {"network": net}, net.get_submodule(QKV).weight[:64].clone()


def change(base, tmp_path, tensors):
    """What the only change in a file makes of the layer's weight."""
    networks, weight = base
    (only,) = read_lora(write(tmp_path, tensors), networks).values()
    return only, only(weight), weight


# --- scales ----------------------------------------------------------------------------------------------------------


ALPHAS = [(torch.tensor(6), 2.0), (torch.tensor([6], dtype=torch.int16), 2.0), (torch.tensor(6.0).half(), 2.0)]


@pytest.mark.parametrize("alpha, scale", [*ALPHAS, (torch.tensor(-3.0), -1.0)])
def test_alpha_of_any_type(alpha, scale, base, tmp_path):
    assert torch.allclose(change(base, tmp_path, lora(alpha=alpha))[1], scale * B @ A, atol=1e-4)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), [1.0, 2.0], []])
def test_alpha_that_is_no_number(alpha, base, tmp_path):
    with pytest.raises(WeightsError, match="alpha (holds|is not of finite)"):
        change(base, tmp_path, lora(alpha=torch.tensor(alpha)))


def test_scalar_and_eight_bits(base, tmp_path):
    only, delta, _ = change(base, tmp_path, lora(scalar=torch.tensor(0.5), alpha=torch.tensor(6.0)))
    assert torch.allclose(delta, B @ A, atol=1e-5)
    small = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in lora().items()}
    down, up = (small[f"{kohya(Q)}.{key}"].float() for key in LORA)
    assert torch.allclose(change(base, tmp_path, small)[1], up @ down, atol=1e-4)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{Q}.lora_{{}}.my_style.weight",
        f"unet.base_model.model.{Q}.lora_{{}}.weight",
        f"module.{Q}.lora_{{}}.default_0.weight",
        "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.lora_{}.weight",
    ],
)
def test_names_of_adapters_and_wrappings(key, base, tmp_path):
    assert torch.allclose(change(base, tmp_path, {key.format("A"): A, key.format("B"): B})[1], B @ A, atol=1e-5)


@pytest.mark.parametrize("start", ["text_encoders.clip_l.transformer.", "cond_stage_model.transformer.", "module."])
def test_names_of_text_encoders(start, tmp_path):
    key = f"{start}text_model.encoder.layers.1.mlp.fc1.lora_{{}}.weight"
    path = write(tmp_path, {key.format("up"): draw(128, 2), key.format("down"): draw(2, 32)})
    assert Loaded(path).inject({"clip_l": text()}) == {"clip_l": 1}


def test_several_adapters_or_two_changes(base, tmp_path):
    two = {f"{Q}.lora_{end}.{name}.weight": x for name in "ab" for end, x in (("A", A), ("B", B))}
    with pytest.raises(WeightsError, match=r"holds the adapters 2 \(a, b\); save each"):
        change(base, tmp_path, two)
    again = kohya("input_blocks.3.1.transformer_blocks.0.attn1.to_q")
    with pytest.raises(WeightsError, match="a second, other change of a layer"):
        change(base, tmp_path, lora() | {f"{again}.lora_down.weight": 2 * A, f"{again}.lora_up.weight": B})


# --- biases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end, scale", [("lora_B.bias", 2.0), ("diff_b", 1.0)])
def test_a_bias_beside_low_rank(end, scale, tmp_path):
    """PEFT's bias of B is scaled as B is."""
    net, bias = text(), draw(128)
    layer = net.blocks[0].mlp.fc1
    before, weight = layer.bias.clone(), layer.weight.clone()
    tensors = {f"{FC1}.lora_A.weight": draw(3, 32), f"{FC1}.lora_B.weight": draw(128, 3), f"{FC1}.{end}": bias,
               f"{FC1}.alpha": torch.tensor(6)}  # fmt: skip
    adapter = Loaded(write(tmp_path, tensors), 0.5)
    adapter.inject({"clip_l": net})
    adapter.merge()
    assert torch.allclose(net.blocks[0].mlp.fc1.bias - before, 0.5 * scale * bias, atol=1e-5)
    adapter.eject()
    assert torch.equal(layer.bias, before) and torch.equal(layer.weight, weight)


@pytest.mark.parametrize("merge", [False, True])
def test_a_bias_for_a_layer_without_one(merge, tmp_path):
    net, bias, x = unet(), draw(64), draw(2, 5, 64)
    layer = net.get_submodule(QKV)
    before = layer(x)
    adapter = Loaded(write(tmp_path, lora(diff_b=bias)), 0.5)
    adapter.inject({"network": net})
    if merge:
        adapter.merge()
    expected = before.clone()
    expected[..., :64] += 0.5 * (x @ (B @ A).T + bias)
    assert torch.allclose(net.get_submodule(QKV)(x), expected, atol=1e-4)
    adapter.scale = 0
    assert torch.equal(net.get_submodule(QKV)(x), before)
    adapter.eject()
    assert torch.equal(net.get_submodule(QKV)(x), before)


def test_biases_alone(tmp_path):
    net = unet()
    adapter = Loaded(write(tmp_path, of(NORM, b_norm=draw(64)) | of(CONV, diff_b=draw(64))))
    before = net.middle[0].res.conv1.bias.clone()
    assert adapter.inject({"network": net}) == {"network": 2}
    adapter.merge()
    assert torch.allclose(net.middle[0].res.conv1.bias - before, draw(64))


# --- kinds, in closed form -------------------------------------------------------------------------------------------


def test_sparse_rest_of_a_weight(base, tmp_path):
    rest = dict(
        bias_indices=torch.tensor([[0, 3], [5, 63]], dtype=torch.int16),
        bias_values=torch.tensor([1.5, -2.0]).half(),
        bias_size=torch.tensor([64, 64], dtype=torch.int16),
    )
    expected = B @ A
    expected[0, 5] += 1.5
    expected[3, 63] -= 2
    assert torch.allclose(change(base, tmp_path, lora(**rest))[1], expected, atol=1e-4)
    with pytest.raises(WeightsError, match="do not make a change"):
        change(base, tmp_path, lora(**rest | {"bias_indices": torch.tensor([[0, 64], [5, 63]])}))
    rest.pop("bias_size")
    with pytest.raises(WeightsError, match="no whole change"):
        change(base, tmp_path, lora(**rest))


@pytest.mark.parametrize("by_input", [0, 1])
def test_ia3(by_input, base, tmp_path):
    vector = draw(64)
    _, delta, weight = change(base, tmp_path, of(Q, weight=vector, on_input=torch.tensor(by_input)))
    assert torch.allclose(delta, weight * (vector if by_input else vector[:, None]))


@pytest.mark.parametrize("swapped", [False, True])
def test_glora(swapped, base, tmp_path):
    a1, a2, b1, b2 = draw(64, 3), draw(3, 64), draw(64, 3) + 1, draw(3, 64) + 1
    names = ("a2", "a1", "b2", "b1") if swapped else ("a1", "a2", "b1", "b2")
    tensors = {f"{name}__weight": x for name, x in zip(names, (a1, a2, b1, b2), strict=True)}
    _, delta, weight = change(base, tmp_path, of(Q, **tensors, alpha=torch.tensor(6.0)))
    assert torch.allclose(delta, 2 * (weight @ a1 @ a2 + b1 @ b2), atol=1e-3)


@pytest.mark.parametrize("limit", [0.0, 1e-3])
def test_oft(limit, base, tmp_path):
    """Each block turns its rows: by (I + S) (I - S)^-1, transposed; S is no longer than the limit, times the rows."""
    blocks, rescale = 0.1 * draw(4, 16, 16), draw(64, 1)
    tensors = of(Q, oft_blocks=blocks, alpha=torch.tensor(limit), rescale=rescale)
    _, delta, weight = change(base, tmp_path, {key.replace("lora_", "oft_"): x for key, x in tensors.items()})
    skew, one = blocks - blocks.mT, torch.eye(16)
    skew = skew * (64 * limit / skew.norm() if limit else 1)
    turns = (one + skew) @ (one - skew).inverse()
    expected = rescale * torch.block_diag(*turns).T @ weight
    assert torch.allclose(weight + delta, expected, atol=1e-4)


def test_boft(base, tmp_path):
    """Rotations all: what is turned keeps its Gram matrix, and rows far apart mix."""
    blocks = 0.1 * draw(3, 8, 8, 8)
    only, delta, weight = change(base, tmp_path, of(Q, oft_blocks=blocks))
    turned = weight + delta
    assert isinstance(only, Rotation) and not torch.allclose(turned, weight, atol=1e-2)
    assert torch.allclose(turned.T @ turned, weight.T @ weight, atol=1e-3)


def test_rank_zero(base, tmp_path):
    empty = of(CONV, lora_down__weight=torch.zeros(0, 64, 3, 3), lora_up__weight=torch.zeros(64, 0, 1, 1),
               alpha=torch.tensor(1))  # fmt: skip
    adapter = Loaded(write(tmp_path, lora() | empty))
    assert len(adapter.changes(base[0])) == 1 and "rank or alpha is 0, which changes nothing: 1" in adapter.notes[0]
    assert not read_lora(write(tmp_path, empty), base[0])
    assert not read_lora(write(tmp_path, lora(alpha=torch.tensor(0.0))), base[0])


def test_lengths_and_low_rank_in_the_kernel_of_a_layer(base, tmp_path):
    """Stored flat, or with a kernel of one pixel: the same."""
    flat = of(Q, lora_down__weight=A[..., None, None], lora_up__weight=B[..., None, None])
    only, delta, _ = change(base, tmp_path, flat)
    assert isinstance(only, LowRank) and only.down.shape == A.shape and torch.allclose(delta, B @ A, atol=1e-5)
    conv = of(CONV, lora_down__weight=draw(2, 576), lora_up__weight=draw(64, 2))
    (only,) = read_lora(write(tmp_path, conv), base[0]).values()
    assert only.down.shape == (2, 64, 3, 3)


# --- what is left out, and what is refused by name -------------------------------------------------------------------


def test_bundled_embeddings_are_left_out_and_said(base, tmp_path):
    adapter = Loaded(write(tmp_path, lora() | {"bundle_emb.my word.string_to_param.*": draw(2, 24)}))
    assert (
        len(adapter.changes(base[0])) == 1 and "bundled with it" in adapter.notes[0] and "my word" in adapter.notes[0]
    )


def test_keys_that_match_nothing(base, tmp_path):
    path = write(tmp_path, lora() | {"lora_unet_nowhere.alpha": torch.tensor(1.0)})
    with pytest.raises(WeightsError, match=r"nothing in this base: 1 \(lora_unet_nowhere.alpha\); strict=false leaves"):
        read_lora(path, base[0])
    adapter = Loaded(path, strict=False)
    assert len(adapter.changes(base[0])) == 1 and "left out: keys that match nothing" in adapter.notes[0]


NAMED = {
    "FLUX": ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", draw(3, 64)),
    "FLUX again": ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", draw(3, 64)),
    "Stable Diffusion 3": ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", draw(3, 64)),
    "Stable Diffusion 1 or 2": (kohya("down_blocks.0.attentions.0.proj_in") + ".lora_down.weight", draw(3, 64)),
    "SDXL": (kohya("down_blocks.1.attentions.0.transformer_blocks.7.attn1.to_q") + ".lora_down.weight", draw(3, 64)),
    "VeRA": (f"base_model.model.{Q}.vera_lambda_b", draw(3)),
    "PEFT's layout": (f"base_model.model.{Q}.oft_R.weight", draw(3, 3)),
    "AdaLoRA": (f"base_model.model.{Q}.lora_E", draw(3, 1)),
    "ControlNet-LLLite": ("lllite_unet_input_blocks_4_1.depth1.0.weight", draw(3)),
    "a whole network": (f"{Q}.base_layer.weight", draw(64, 64)),
    "textual-inversion": ("emb_params", draw(2, 24)),
    "an IP-Adapter": ("ip_adapter.1.to_k_ip.weight", draw(2, 24)),
    "whole bias or a difference": (f"{Q}.bias", draw(64)),
}


@pytest.mark.parametrize("words", NAMED)
def test_what_it_is_called(words, base, tmp_path):
    key, tensor = NAMED[words]
    beside = lora() if words.startswith(("a whole", "whole")) else {}
    with pytest.raises(WeightsError, match=words.removesuffix(" again")):
        read_lora(write(tmp_path, beside | {key: tensor}), base[0])


def test_a_text_encoder_of_another_width(tmp_path):
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    path = write(tmp_path, {f"{stem}.lora_down.weight": draw(2, 768), f"{stem}.lora_up.weight": draw(768, 2)})
    with pytest.raises(WeightsError, match="made for a text encoder of width 768, but .* of width 32"):
        read_lora(path, {"clip_l": text()})


@pytest.mark.parametrize(
    "keys, words",
    [(["lora_controlnet", "input_hint_block.0.weight"], "Control-LoRA"), (["difference"], "difference to its base"),
     (["lllite_unet_x.down.0.weight"], "LLLite"), (["controlnet_blocks.0.weight"], "SD3 or FLUX"),
     (["task_embedding"], "Union")],
)  # fmt: skip
def test_what_steers_in_another_way(keys, words):
    assert words in other_kind(keys)
    assert other_kind(["control_model.input_hint_block.0.weight", "zero_convs.0.0.weight"]) is None
    assert other_kind(["body.0.block1.weight", "adapter.conv_in.weight"]) is None
