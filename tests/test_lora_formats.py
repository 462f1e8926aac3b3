"""Files of LoRA and its kin: every spelling of a key, scales, closed forms of each kind, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.adapters.lora import Loaded, LoHa, LoKr, LoRA
from ldm.adapters.lora_formats import read_lora
from ldm.conditioning.clip import CLIPText
from ldm.models.unet import UNet
from ldm.utils.errors import ConfigError, WeightsError

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
NORM = "mid_block.resnets.0.norm1"


def unet(context_dim=24, depth=(0, 1, 1)):
    torch.manual_seed(0)
    net = UNet(4, channels=32, channel_mult=[1, 2], num_res_blocks=1, depth=depth, head_dim=32, context_dim=context_dim)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net.eval().requires_grad_(False)


def text():
    torch.manual_seed(1)
    return CLIPText(32, 2, 4, "quick_gelu", vocab_size=10, length=7).eval().requires_grad_(False)


def kohya(name, prefix="lora_unet_"):
    return prefix + name.replace(".", "_")


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def factors(size=64, rank=3):
    return draw(rank, size), draw(size, rank)


def write(tmp_path, tensors, name="lora.safetensors", metadata=None):
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, tmp_path / name, metadata)
    return tmp_path / name


def merged(path, net, where, scale=1.0):
    """What the file adds to the weight of a layer of ours."""
    layer = net.get_submodule(where)
    before = layer.weight.clone()
    adapter = Loaded(path, scale)
    adapter.inject({"network": net})
    adapter.merge()
    added = layer.weight - before
    adapter.eject()
    assert torch.equal(layer.weight, before)
    return added


QKV = "encoder.levels.1.blocks.0.transformer.blocks.0.self_attn.qkv"


# --- spellings -------------------------------------------------------------------------------------------------------


SGM = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
SPELLINGS = [  # {} is down, then up
    kohya(Q) + ".lora_{}.weight",
    kohya(SGM) + ".lora_{}.weight",
    kohya(Q, "lycoris_") + ".lora_{}.weight",
    f"unet.{Q}.lora.{{}}.weight",
    f"unet.{Q.replace('.to_q', '.processor.to_q_lora')}.{{}}.weight",
    f"{Q.replace('.to_q', '.processor.to_q_lora')}.{{}}.weight",
]
SPELLINGS_AB = [
    f"unet.{Q}.lora_{{}}.weight",
    f"{Q}.lora_{{}}.weight",
    f"base_model.model.{Q}.lora_{{}}.default.weight",
    f"module._orig_mod.{Q}.lora_{{}}.weight",
    f"diffusion_model.{SGM}.lora_{{}}.weight",
]


@pytest.mark.parametrize(
    "key, ends", [(key, ("down", "up")) for key in SPELLINGS] + [(key, "AB") for key in SPELLINGS_AB]
)
def test_every_spelling_is_the_same_layer(key, ends, tmp_path):
    a, b = factors()
    added = merged(write(tmp_path, {key.format(ends[0]): a, key.format(ends[1]): b}), unet(), QKV)
    assert torch.allclose(added[:64], b @ a, atol=1e-5) and not added[64:].any()


@pytest.mark.parametrize(
    "key, ends, slots",
    [
        ("lora_te_text_model_encoder_layers_1_mlp_fc1.lora_{}.weight", ("down", "up"), ["clip_l"]),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_{}.weight", ("down", "up"), ["clip_l", "clip_g"]),
        ("text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.{}.weight", ("down", "up"), ["clip_l"]),
        ("text_encoder.encoder.layers.1.mlp.fc1.lora_{}.weight", "AB", ["clip_l"]),
        ("lora_te2_text_model_encoder_layers_1_mlp_fc1.lora_{}.weight", ("down", "up"), ["clip_g", "clip_l"]),
        ("text_encoder_2.text_model.encoder.layers.1.mlp.fc1.lora_{}.weight", "AB", ["clip_g", "clip_l"]),
    ],
)
def test_text_encoders_by_number(key, ends, slots, tmp_path):
    networks = {"network": unet(), **{slot: text() for slot in sorted(slots, reverse=True)}}
    path = write(tmp_path, {key.format(ends[0]): draw(2, 32), key.format(ends[1]): draw(128, 2)})
    assert Loaded(path).inject(networks) == {slots[0]: 1}


def test_fused_in_proj_of_open_clip(tmp_path):
    """Rows 0:D, D:2D, 2D:3D are q, k, v; the three names of others land on the same rows."""
    a, b = draw(2, 32), draw(96, 2)
    fused = {"lora_te_transformer_resblocks_0_attn_in_proj.lora_down.weight": a,
             "lora_te_transformer_resblocks_0_attn_in_proj.lora_up.weight": b}  # fmt: skip
    apart = {}
    for name, rows in zip("qkv", b.chunk(3), strict=True):
        stem = f"lora_te_text_model_encoder_layers_0_self_attn_{name}_proj"
        apart |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": rows}
    for i, tensors in enumerate((fused, apart)):
        net = text()
        layer = net.blocks[0].attention.qkv
        before = layer.weight.clone()
        adapter = Loaded(write(tmp_path, tensors, f"{i}.safetensors"))
        adapter.inject({"clip_l": net})
        adapter.save(tmp_path / f"again{i}.safetensors")
        adapter.merge()
        assert torch.allclose(layer.weight - before, b @ a, atol=1e-5)
        assert len(read_lora(tmp_path / f"again{i}.safetensors", {"clip_l": text()})) == 3


def test_both_names_of_one_layer_count_once(tmp_path):
    a, b = factors()
    names = [kohya(Q), kohya("input_blocks.3.1.transformer_blocks.0.attn1.to_q")]
    tensors = {f"{name}.lora_{end}.weight": x for name in names for end, x in (("down", a), ("up", b))}
    assert torch.allclose(merged(write(tmp_path, tensors), unet(), QKV)[:64], b @ a, atol=1e-5)


# --- scales ----------------------------------------------------------------------------------------------------------


def test_alpha_is_honoured_and_absent_means_one(tmp_path):
    a, b = factors(rank=8)
    stem = kohya(Q)
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
    for alpha, scale in ((None, 1.0), (1.0, 0.125), (16.0, 2.0)):
        found = tensors if alpha is None else tensors | {f"{stem}.alpha": torch.tensor(alpha)}
        added = merged(write(tmp_path, found), unet(), QKV, scale=0.5)
        assert torch.allclose(added[:64], 0.5 * scale * b @ a, atol=1e-6 * float((b @ a).abs().max()))


@pytest.mark.parametrize("stabilized, scale", [(False, 8 / 16), (True, 8 / 4)])
def test_scale_of_peft_and_diffusers_settings(stabilized, scale, tmp_path):
    """Of to_q; to_k has an alpha of its own."""
    a, b = factors(rank=16)
    settings = {"lora_alpha": 8, "r": 16, "use_rslora": stabilized, "alpha_pattern": {Q.replace("to_q", "to_k"): 32}}
    tensors = {
        f"{name}.lora_{end}.weight": x
        for name in (Q, Q.replace("to_q", "to_k"))
        for end, x in zip("AB", (a, b), strict=True)
    }
    inside = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    files = [write(tmp_path, {f"unet.{key}": x for key, x in tensors.items()}, metadata=inside)]
    write(tmp_path, {f"base_model.model.{key}": x for key, x in tensors.items()}, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    for path in (*files, tmp_path):
        added = merged(path, unet(), QKV)
        assert torch.allclose(added[:64], scale * b @ a, atol=1e-5)
        assert torch.allclose(added[64:128], 4 * scale * b @ a, atol=1e-4)


# --- kinds, in closed form -------------------------------------------------------------------------------------------


def test_convolutions_and_tucker(tmp_path):
    a, mid, b = draw(3, 64, 1, 1), draw(3, 3, 3, 3), draw(64, 3, 1, 1)
    stem = kohya(CONV)
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": b}
    expected = torch.einsum("os,srhw,ri->oihw", b[..., 0, 0], mid, a[..., 0, 0])
    assert torch.allclose(merged(write(tmp_path, tensors), unet(), "middle.0.res.conv1"), expected, atol=1e-4)
    a = draw(3, 64, 3, 3)
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
    expected = torch.einsum("or,rihw->oihw", b[..., 0, 0], a)
    assert torch.allclose(merged(write(tmp_path, tensors), unet(), "middle.0.res.conv1"), expected, atol=1e-4)


def test_hadamard_kronecker_and_full(tmp_path):
    stem, net = kohya(Q), unet()
    w = {f"{stem}.hada_w{i}_{x}": draw(*shape) for i in (1, 2) for x, shape in (("a", (64, 3)), ("b", (3, 64)))}
    first, second = (w[f"{stem}.hada_w{i}_a"] @ w[f"{stem}.hada_w{i}_b"] for i in (1, 2))
    added = merged(write(tmp_path, w | {f"{stem}.alpha": torch.tensor(6.0)}), net, QKV)
    assert torch.allclose(added[:64], 2 * first * second, atol=1e-4)
    w1, a, b = draw(4, 8), draw(16, 2), draw(2, 8)
    tensors = {
        f"{stem}.lokr_w1": w1,
        f"{stem}.lokr_w2_a": a,
        f"{stem}.lokr_w2_b": b,
        f"{stem}.alpha": torch.tensor(1.0),
    }
    assert torch.allclose(merged(write(tmp_path, tensors), net, QKV)[:64], torch.kron(w1, a @ b) / 2, atol=1e-5)
    whole = {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": a @ b, f"{stem}.alpha": torch.tensor(7.0)}
    assert torch.allclose(merged(write(tmp_path, whole), net, QKV)[:64], torch.kron(w1, a @ b), atol=1e-5)
    diff = draw(64, 64)
    assert torch.allclose(merged(write(tmp_path, {f"{stem}.diff": diff}), net, QKV)[:64], diff, atol=1e-6)


def test_norms_and_biases(tmp_path):
    net = unet()
    norm, conv = net.middle[0].res.norm1, net.middle[0].res.conv1
    x = draw(1, 64, 5, 5)
    w, b, bias = draw(64), draw(64), draw(64)
    expected = nn.functional.group_norm(x, 32, norm.weight + 0.5 * w, norm.bias + 0.5 * b)
    tensors = {kohya(NORM) + ".w_norm": w, kohya(NORM) + ".b_norm": b, kohya(CONV) + ".diff_b": bias,
               kohya(CONV) + ".diff": torch.zeros(64, 64, 3, 3)}  # fmt: skip
    after = conv(x) + 0.5 * bias[:, None, None]
    adapter = Loaded(write(tmp_path, tensors), 0.5)
    assert adapter.inject({"network": net}) == {"network": 2}
    adapted = net.middle[0].res
    assert torch.allclose(adapted.norm1(x), expected, atol=1e-5) and adapted.norm1.num_groups == 32
    assert torch.allclose(adapted.conv1(x), after, atol=1e-5)
    adapter.save(tmp_path / "again.safetensors")
    assert (
        read_lora(tmp_path / "again.safetensors", {"network": net}).keys() == adapter.changes({"network": net}).keys()
    )


@pytest.mark.parametrize("name, where, size", [(Q, QKV, 64), (CONV, "middle.0.res.conv1", 64)])
@pytest.mark.parametrize("by", ["output", "input", "peft"])
def test_the_axis_of_dora_is_that_of_its_shape(name, where, size, by, tmp_path):
    """m (W + dW) / |W + dW|, the norm of W + dW, over all axes but that of m."""
    net = unet()
    weight = net.get_submodule(where).weight[:size].clone()
    kernel = weight.shape[2:]
    a, b = draw(3, size, *kernel), draw(size, 3, *[1] * len(kernel))
    length = draw(size).abs() + 0.5
    shape = (1, size, *[1] * len(kernel)) if by == "input" else (size, 1, *[1] * len(kernel))
    stem = kohya(name)
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.dora_scale": length.view(shape)}
    if by == "peft":
        magnitude = length.view(1, -1, 1, 1) if kernel else length
        tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_magnitude_vector": magnitude}
    direction = weight + (b.flatten(1) @ a.flatten(1)).view(weight.shape)
    axes = [axis for axis in range(weight.ndim) if axis != (by == "input")]
    expected = length.view(shape) * direction / direction.square().sum(axes, keepdim=True).sqrt()
    added = merged(write(tmp_path, tensors), net, where, scale=0.5)[:size]
    assert torch.allclose(added, 0.5 * (expected - weight), atol=1e-5)


# --- writing ---------------------------------------------------------------------------------------------------------

PLAIN = {"network": unet, "clip_l": text}
MAKERS = {
    "lora": lambda **to: LoRA(3, 5.0, **to),
    "tucker": lambda **to: LoRA(2, tucker=True, **to),
    "dora": lambda **to: LoRA(2, 4.0, decompose=True, **to),
    "loha": lambda **to: LoHa(2, 3.0, **to),
    "loha tucker": lambda **to: LoHa(2, tucker=True, **to),
    "lokr": lambda **to: LoKr(1, 3.0, **to),
}


@pytest.mark.parametrize(
    "kind, layout",
    [
        *((kind, "kohya") for kind in MAKERS),
        *((k, lay) for k in ("lora", "tucker", "dora") for lay in ("diffusers", "peft")),
    ],
)
def test_what_is_written_is_read_again(kind, layout, tmp_path):
    texts = {} if layout == "peft" else {"clip_l": text()}
    networks = {"network": unet(), **texts}
    adapter = MAKERS[kind](targets=r"attn|conv1$", text_targets="fc1" if texts else None)
    count = adapter.inject(networks)
    for p in adapter.trainable().values():
        p.data.add_(0.1 * draw(*p.shape))
    path = tmp_path / ("folder" if layout == "peft" else "lora.safetensors")
    adapter.save(path, layout)
    again = {"network": unet(), **{slot: text() for slot in texts}}
    loaded = Loaded(path)
    assert loaded.inject(again) == count
    for one in (adapter, loaded):
        one.merge()
    for slot, net in networks.items():
        mine, theirs = net.state_dict(), again[slot].state_dict()
        assert all(torch.allclose(mine[key], theirs[key], atol=1e-6) for key in PLAIN[slot]().state_dict())


def test_what_a_layout_cannot_hold(tmp_path):
    net, adapter = unet(), LoHa(2, targets="attn")
    adapter.inject({"network": net})
    for layout, message in (("diffusers", "has no place in diffusers"), ("a1111", "layout='a1111' is not known")):
        with pytest.raises(ConfigError, match=message):
            adapter.save(tmp_path / "x.safetensors", layout)
    assert not list(tmp_path.iterdir())


# --- what is refused, the base untouched -----------------------------------------------------------------------------


def lora(stem, a, b):
    return {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}


REFUSED = {
    "keys that match nothing": (
        lora(kohya(Q), *factors()) | {"lora_unet_nowhere.alpha": torch.tensor(1.0), "emb.weight": torch.ones(2)},
        r"match nothing in this base: 2 \(emb.weight, lora_unet_nowhere.alpha\)",
    ),
    "another text": (
        lora(kohya(Q.replace("attn1.to_q", "attn2.to_k")), draw(3, 2048), draw(64, 3)),
        r"made for SDXL \(text of width 2048\), but the base is another network \(text of width 24\)",
    ),
    "another width": (lora(kohya(Q), draw(3, 320), draw(320, 3)), r"down \(3, 320\), up \(320, 3\), which do not make"),
    "ranks that differ": (lora(kohya(Q), draw(3, 64), draw(64, 4)), r"down \(3, 64\), up \(64, 4\), which do not make"),
    "half of it": ({kohya(Q) + ".lora_down.weight": draw(3, 64)}, "has down, which is no whole change"),
    "not finite": (lora(kohya(Q), draw(3, 64) * float("nan"), draw(64, 3)), "down is not of finite floating-point"),
    "whole numbers": (lora(kohya(Q), torch.ones(3, 64, dtype=torch.int8), draw(64, 3)), "not of finite floating-point"),
    "another kernel": (lora(kohya(CONV), draw(3, 64, 1, 1), draw(64, 3, 1, 1)), "do not make a change of a weight"),
    "nothing": ({}, "an empty file; expected a LoRA"),
    "no adapter": ({"input_blocks.0.0.weight": draw(2), "out.2.bias": draw(2)}, "nothing known: 2 .*; expected a LoRA"),
    "lengths that do not fit": (
        lora(kohya(Q), *factors()) | {kohya(Q) + ".dora_scale": torch.ones(7)},
        r"dora_scale \(7,\), .* which do not make",
    ),
    "a bias of another size": (
        {kohya(Q) + ".diff": torch.ones(64, 64), kohya(Q) + ".diff_b": torch.ones(3)},
        r"diff_b \(3,\), which do not make a change of a weight \(64, 64\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    tensors, message = REFUSED[case]
    net = unet()
    state, modules = {key: value.clone() for key, value in net.state_dict().items()}, list(net.modules())
    with pytest.raises(WeightsError, match=message) as caught:
        Loaded(write(tmp_path, tensors)).inject({"network": net})
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert list(net.modules()) == modules and all(torch.equal(value, state[k]) for k, value in net.state_dict().items())


@pytest.mark.parametrize(
    "settings, message",
    [
        (None, "no adapter_config.json beside it"),
        ({"r": 3}, "lora_alpha=None"),
        ({"r": 3, "lora_alpha": 1, "alpha_pattern": {".*(a+)+b": 2}}, "expected numbers, by names"),
    ],
)
def test_settings_that_are_refused(settings, message, tmp_path):
    a, b = factors()
    write(tmp_path, {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}, "adapter_model.safetensors")
    if settings:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=message):
        Loaded(tmp_path).inject({"network": unet()})
    with pytest.raises(WeightsError, match="a folder without"):
        Loaded(tmp_path.parent).inject({"network": unet()})
