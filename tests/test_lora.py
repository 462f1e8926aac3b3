"""LoRA and its kin on networks: counts, bit-equality, merging, several at once, training, composition."""

import pytest
import torch
from torch import nn

from ldm.adapters.base import only
from ldm.adapters.composition import composite, switch, windowed
from ldm.adapters.lora import Loaded, LoHa, LoKr, LoRA
from ldm.build import compose, make
from ldm.conditioning.clip import CLIPText
from ldm.conditioning.memory import Memory
from ldm.conditioning.text_transformer import TextTransformer
from ldm.conditioning.tokenizers import train_words
from ldm.diffusion import guidance
from ldm.models.dit import DiT
from ldm.models.unet import SpatialTransformer, UNet
from ldm.training.ema import EMA
from ldm.utils.errors import ConfigError

ATTENTION = r"\.attn[12]\.to_(q|k|v|out\.0)$"
KOHYA = r"attentions\.\d+\."
LCM = r"attentions\.\d+\.|resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)$|samplers\.0\.conv$"  # LCM-LoRA's set
TEXT = r"(_proj|fc[12])$"


def tiny(**changes):
    """A small UNet whose zero-initialised parameters are drawn anew, so that everything matters."""
    torch.manual_seed(0)
    small = dict(in_channels=4, channels=32, channel_mult=[1, 2], num_res_blocks=1, depth=[0, 1, 1], head_dim=32)
    net = UNet(**small | dict(context_dim=24) | changes).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net.requires_grad_(False)


def inputs(size=(8, 8)):
    torch.manual_seed(1)
    return torch.randn(2, 4, *size), torch.linspace(0, 999, 2), torch.randn(2, 6, 24)


def run(net, size=(8, 8)):
    x, t, context = inputs(size)
    with torch.no_grad():
        return net(x, t, context=context)


@torch.no_grad()
def trained(adapter, seed=2):
    """As after some training."""
    torch.manual_seed(seed)
    for parameter in adapter.trainable().values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def close(a, b, tol=1e-5):
    return float((a - b).abs().max() / b.abs().max()) <= tol


KINDS = {
    "lora": lambda: LoRA(3, 5.0, targets=LCM),
    "rslora": lambda: LoRA(4, 2.0, targets=LCM, rank_stabilized=True),
    "tucker": lambda: LoRA(3, targets=LCM, tucker=True),
    "dora": lambda: LoRA(3, targets=LCM, decompose=True),
    "loha": lambda: LoHa(2, targets=LCM),
    "loha tucker": lambda: LoHa(2, targets=LCM, tucker=True),
    "lokr": lambda: LoKr(1, targets=LCM),
    "lokr dora": lambda: LoKr(1, targets=LCM, factor=4, decompose=True),
}


# --- published numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, slot, targets, rank, modules, count",
    [
        ("sd15", "network", ATTENTION, 4, 128, 797_184),
        ("sd15", "network", KOHYA, 1, 192, 423_936),
        ("sd15", "network", LCM, 64, 278, 67_252_224),
        ("sdxl", "network", ATTENTION, 4, 560, 5_806_080),
        ("sdxl", "network", KOHYA, 1, 722, 2_659_840),
        ("sdxl", "network", LCM, 64, 788, 196_751_360),
        ("clip_l", "clip_l", TEXT, 1, 72, 165_888),
        ("clip_g", "clip_g", TEXT, 1, 192, 737_280),
    ],
)
def test_published_counts(name, slot, targets, rank, modules, count):
    with torch.device("meta"):
        net = make(compose("train", [f"network={name}"])["network"], "network")
    adapter = LoRA(rank, targets=targets, text_targets=targets)
    assert adapter.inject({slot: net}) == {slot: modules}
    assert sum(p.numel() for p in adapter.trainable().values()) == count


def test_lengths_of_dora():
    with torch.device("meta"):
        net = make(compose("train", ["network=sd15"])["network"], "network")
    adapter = LoRA(1, targets=ATTENTION, decompose=True)
    adapter.inject({"network": net})
    assert sum(p.numel() for p in adapter.trainable().values()) == 199_296 + 99_840


# --- one adapter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, size", [*((kind, (8, 8)) for kind in KINDS), ("lora", (66, 64)), ("dora", (66, 64))])
def test_begins_as_nothing_acts_merges_and_leaves_no_trace(kind, size):
    """Large images too: there an upsampler looks at its convolution's weight instead of calling it."""
    net = tiny(linear_projection=size == (8, 8))
    base, state = run(net, size), {key: value.clone() for key, value in net.state_dict().items()}
    adapter = KINDS[kind]()
    assert adapter.inject({"network": net}) == {"network": 79}
    assert net.state_dict().keys() > state.keys(), "the base keeps its keys"
    assert torch.equal(run(net, size), base)
    trained(adapter)
    out = run(net, size)
    assert not close(out, base, 1e-2)
    adapter.merge()
    assert close(run(net, size), out)
    adapter.scale = 0.5
    half = run(net, size)
    adapter.unmerge()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items()), "not one bit lost"
    assert close(run(net, size), half) and not close(half, out, 1e-2)
    adapter.merge()
    adapter.eject()
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(run(net, size), base)


def test_merged_weight_is_the_formula():
    """Of q, k, v: each its own rows of one matrix of ours."""
    net = tiny()
    layer = net.middle[0].transformer.blocks[0].self_attn.qkv
    before = layer.weight.clone()
    adapter = LoRA(3, 5.0, targets=r"mid_block.*attn1\.to_(q|v)$")
    adapter.inject({"network": net})
    trained(adapter)
    (down,) = (p for name, p in adapter.trainable().items() if name.endswith("down"))
    (up,) = (p for name, p in adapter.trainable().items() if name.endswith("up"))
    changes = [up_ @ down_ for up_, down_ in zip(up.chunk(2), down.chunk(2), strict=True)]
    expected = before + 0.7 * 5 / 3 * torch.cat([changes[0], torch.zeros_like(changes[0]), changes[1]])
    adapter.scale = 0.7
    adapter.merge()
    assert torch.allclose(layer.weight, expected, atol=1e-6, rtol=0)


def test_strength_of_dora_is_an_interpolation():
    """W + k (W' - W), not another length for every k."""
    net = tiny()
    layer = net.encoder.conv_in
    weight = layer.weight.clone()
    adapter = LoRA(3, targets="^conv_in$", decompose=True)
    adapter.inject({"network": net})
    trained(adapter)
    merged = {}
    for k in (1.0, 0.3):
        adapter.scale = k
        adapter.merge()
        merged[k] = layer.weight.clone()
    assert torch.allclose(merged[0.3], weight + 0.3 * (merged[1.0] - weight), atol=1e-6)


def test_trains_alone_with_checkpointing_and_dropout():
    x, t, context = inputs()
    grads = []
    for checkpointing in (False, True):
        net = tiny(checkpointing=checkpointing).train()
        adapter = LoRA(3, targets=LCM, dropout=0.1)
        adapter.inject({"network": net})
        trained(adapter)
        net.train()
        torch.manual_seed(3)
        net(x, t, context=context).square().sum().backward()
        own = adapter.trainable()
        assert own.keys() == {f"network.{name}" for name, p in net.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.any() for p in own.values())
        grads.append([p.grad for p in own.values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "tucker"])
def test_kinds_learn(kind):
    net, target = tiny(), tiny(head_dim=16)
    adapter = KINDS[kind]()
    adapter.inject({"network": net})
    x, t, context = inputs()
    wanted = target(x, t, context=context) * 0.5
    optimizer = torch.optim.Adam(adapter.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = (net(x, t, context=context) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_averaged_and_copied_networks_have_adapters_of_their_own(tmp_path):
    net = tiny()
    adapter = LoRA(3, targets=LCM)
    adapter.inject({"network": net})
    trained(adapter)
    averaged = EMA(net).applied(net)
    before = run(net)
    assert close(run(averaged), before)
    copied = adapter.on({"network": averaged})
    copied.save(tmp_path / "average.safetensors")
    trained(adapter, seed=5)
    assert close(run(averaged), before) and not close(run(net), before)
    copied.eject()
    assert torch.equal(run(averaged), run(tiny()))


def test_compiled_networks_follow():
    """Another scale is no other program; an adapter that comes or goes is."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    net = SpatialTransformer(32, 1, 16, context_dim=24, linear_projection=False).requires_grad_(False)
    x, _, context = inputs()
    x = x.repeat(1, 8, 1, 1)
    compiled, base = torch.compile(net, backend=backend, fullgraph=True), net(x, context, None)
    assert torch.equal(compiled(x, context, None), base)
    adapter = LoRA(3, targets="attn|proj_out")
    adapter.inject({"network": net})
    trained(adapter)
    outs = []
    for scale in (1.0, 0.5, -0.2):
        adapter.scale = scale
        outs.append(compiled(x, context, None))
        assert torch.equal(outs[-1], net(x, context, None))
    assert len(graphs) == 2 and not close(outs[0], outs[1], 1e-3)
    adapter.eject()
    assert torch.equal(compiled(x, context, None), base)


def test_any_network_under_the_names_it_has():
    """A transformer has published ones; a text encoder that nobody published has those it has here."""
    dit = DiT(4, sample_size=8, width=32, depth=2, num_heads=2, num_classes=3)
    text = TextTransformer(train_words(["a cat"]), width=32, depth=1, head_dim=16)
    adapter = LoRA(2, targets=ATTENTION, text_targets=r"attention\.(qkv|out)$")
    assert adapter.inject({"network": dit, "text": text, "autoencoder": nn.Linear(2, 2)}) == {"network": 8, "text": 2}


# --- several ---------------------------------------------------------------------------------------------------------


def files(tmp_path, count=3):
    """Adapters of different ranks and layers, as files."""
    paths = []
    for i, targets in zip(range(count), (ATTENTION, LCM, r"to_(q|v)$|conv1$"), strict=False):
        net, adapter = tiny(), LoRA(2 + i, 1.5, targets=targets, name=f"a{i}")
        adapter.inject({"network": net})
        trained(adapter, seed=10 + i).save(tmp_path / f"a{i}.safetensors")
        paths.append(tmp_path / f"a{i}.safetensors")
    return paths


def test_several_add_up_in_any_order_and_leave_in_any(tmp_path):
    base, alone = run(tiny()), []
    net, adapters = tiny(), [Loaded(path, 0.6) for path in files(tmp_path)]
    weight = net.middle[0].transformer.blocks[0].self_attn.qkv.weight.clone()
    for adapter in adapters:
        adapter.inject({"network": net})
        with only(adapters, adapter):
            alone.append(net.middle[0].transformer.blocks[0].self_attn.qkv.weight - weight)
    layer = net.middle[0].transformer.blocks[0].self_attn.qkv
    assert len(layer.joined.adapters) == 3, "one product for all"
    assert torch.allclose(layer.weight, weight + sum(alone), atol=1e-6)
    together = run(net)
    for adapter in reversed(adapters):
        adapter.merge()
    assert close(run(net), together)
    other = tiny()
    for adapter in reversed(swapped := [Loaded(adapter.path, 0.6) for adapter in adapters]):
        adapter.inject({"network": other})
    assert close(run(other), together), "merge(A, B) = merge(B, A)"
    adapters[1].unmerge()
    assert close(run(net), together)
    adapters[0].eject()
    swapped[0].eject()
    assert close(run(net), run(other))
    adapters[2].eject()
    adapters[1].eject()
    assert torch.equal(run(net), base) and net.state_dict().keys() == tiny().state_dict().keys()


def test_the_trained_one_goes_beside_loaded_ones(tmp_path):
    net, (path,) = tiny(), files(tmp_path, 1)
    loaded, new = Loaded(path), LoRA(2, targets=ATTENTION)
    loaded.inject({"network": net})
    before = run(net)
    new.inject({"network": net})
    assert torch.equal(run(net), before) and not loaded.trainable() and len(new.trainable()) == 40
    loaded.eject()
    trained(new)
    out = run(net)
    loaded.inject({"network": net})
    loaded.scale = 0
    assert close(run(net), out)


# --- composition: arXiv:2402.16843 -----------------------------------------------------------------------------------


class Denoiser:
    """Of a UNet that answers with x0 itself."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x, t, *, variance=False, **cond):
        return self.net(x, torch.full(x.shape[:1], 999 * t), **cond)


@pytest.fixture
def composed(tmp_path):
    """denoise, guided; two adapters; what each alone gives."""
    net, (x, _, context) = tiny(), inputs()
    adapters = [Loaded(path) for path in files(tmp_path, 2)]
    for adapter in adapters:
        adapter.inject({"network": net})
    denoise = torch.no_grad()(guidance.cfg(Denoiser(net), {"context": context}, {"context": 0 * context}, scale=3.0))
    alone = []
    for adapter in adapters:
        with only(adapters, adapter):
            alone.append(denoise(x, 0.5))
    return denoise, adapters, alone, x


def test_one_adapter_is_the_same_however_composed(composed):
    denoise, adapters, alone, x = composed
    adapters[1].scale = 0
    expected = denoise(x, 0.5)
    assert torch.equal(switch(denoise, adapters[:1], [1.0, 0.5, 0.0])(x, 0.5), expected)
    assert close(composite(denoise, adapters[:1])(x, 0.5), expected)
    assert torch.equal(windowed(lambda: denoise, {adapters[0]: (0.0, 1.0)})(x, 0.5), expected)


def test_composite_is_the_mean_of_guided_scores(composed):
    denoise, adapters, alone, x = composed
    together = denoise(x, 0.5)
    both = composite(denoise, adapters)
    assert close(both(x, 0.5), (alone[0] + alone[1]) / 2) and not close(both(x, 0.5), together, 1e-3)
    assert close(composite(denoise, [adapters[0]] * 2)(x, 0.5), composite(denoise, adapters[:1])(x, 0.5))
    assert torch.equal(denoise(x, 0.5), together), "all act again"
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    regions = composite(denoise, adapters, weights=[mask, 1 - mask])(x, 0.5)
    assert close(regions, torch.cat([alone[0][..., :4], alone[1][..., 4:]], dim=-1))
    with pytest.raises(ConfigError, match="masks must cover the image"):
        composite(denoise, adapters, weights=[mask, 0 * mask])


def test_switch_takes_turns_by_step(composed):
    _, adapters, _, x = composed
    trace = []

    def denoise(x, t, *, variance=False):
        trace.append([adapter.active for adapter in adapters].index(True))
        return x

    times = torch.linspace(1, 0, 13).tolist()
    turns = switch(denoise, adapters, times, every=3)
    for t in times[:-1]:
        turns(x, t)
    assert trace == [int((n - 1) % 6 / 3) for n in range(1, 13)]  # Eq. (4)
    turns(x, times[4])
    assert trace[-1] == trace[4], "read off the time: nothing is counted"
    assert all(adapter.active for adapter in adapters)


@pytest.mark.parametrize("decompose", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_what_a_text_encoder_has_read_is_read_again_at_another_scale(decompose):
    torch.manual_seed(0)
    net, memory = CLIPText(64, 1, 1, "gelu", vocab_size=9).eval(), Memory()
    adapter = LoRA(2, text_targets="q_proj|fc1", decompose=decompose)
    adapter.inject({"clip_l": net})
    trained(adapter)

    def recalled():
        return memory.recall(net, [(1, 2), (3, 4)], lambda ids: {"context": net(torch.tensor(ids))})["context"]

    for scale in (1.0, 0.5, 0.0):
        adapter.scale = scale
        assert torch.equal(recalled(), net(torch.tensor([(1, 2), (3, 4)])))
    plain = recalled()
    adapter.scale = 1.0
    assert not close(recalled(), plain, 1e-2)


def test_windows_open_and_close(composed):
    denoise, adapters, alone, x = composed
    made = []

    def make():  # encodes prompts, in the hands of whichever act
        made.append([adapter.active for adapter in adapters])
        return denoise

    inside = windowed(make, {adapters[0]: (0.0, 0.6), adapters[1]: (0.6, 1.0)})
    assert torch.equal(inside(x, 0.5), alone[0])
    assert not close(inside(x, 0.4), inside(x, 0.5), 1e-2), "a window's end is not in it, its start is"
    assert torch.equal(inside(x, 0.5), alone[0]) and made == [[True, False], [False, True]], "once for each set"
    with only(adapters, adapters[1]):
        assert not made[2:] and not close(inside(x, 0.5), alone[0], 1e-2) and made[2:] == [[False, False]]
    with pytest.raises(ConfigError, match="window"):
        windowed(make, {adapters[0]: (0.7, 0.2)})


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.8", None, True])
def test_a_scale_is_a_finite_number(scale):
    adapter = LoRA(targets=ATTENTION)
    with pytest.raises(ConfigError, match="adapter lora: scale="):
        adapter.scale = scale


@pytest.mark.parametrize(
    "make_adapter, message",
    [
        (lambda: LoRA(0, targets=ATTENTION), "rank=0"),
        (lambda: LoRA(2, float("nan"), targets=ATTENTION), "alpha=nan"),
        (lambda: LoRA(2, targets=ATTENTION, dropout=1.0), "dropout=1.0"),
        (lambda: LoRA(2), "neither targets nor text_targets"),
        (
            lambda: LoRA(2, targets="attn9"),
            r"'attn9' matches none of network's layers: \d+ \(conditioning|time_embedding",
        ),
        (lambda: LoRA(2, targets="("), "no regular expression"),
    ],
)
def test_settings_that_cannot_be(make_adapter, message):
    net = tiny()
    with pytest.raises(ConfigError, match=message):
        make_adapter().inject({"network": net})
    assert net.state_dict().keys() == tiny().state_dict().keys()


def test_verbs_out_of_order():
    net, adapter = tiny(), LoRA(targets=ATTENTION)
    with pytest.raises(ConfigError, match="is not injected"):
        adapter.merge()
    adapter.inject({"network": net})
    with pytest.raises(ConfigError, match="is injected already"):
        adapter.inject({"network": net})
    with pytest.raises(ConfigError, match="another of this name"):
        LoRA(targets=ATTENTION).inject({"network": net})
