"""ControlNet of transformers: what is copied, that it starts as nothing, where it adds."""

import pytest
import torch
from torch import nn

from ldm.adapters.training import controlnet
from ldm.models.controlnet_transformer import ControlNetTransformer
from ldm.models.dit import DiT
from ldm.models.pixart import PixArt
from ldm.utils.errors import ConfigError
from tests.test_controlnet import hint, joined, parameters, randomised, tiny

SMALL = {"sample_size": 8, "width": 16, "depth": 3, "num_heads": 2, "context_dim": 12}
BASES = {
    "pixart": lambda **knobs: PixArt(4, **SMALL | knobs),
    "dit": lambda **knobs: DiT(4, **SMALL | knobs),
    "in_context": lambda **knobs: DiT(4, conditioning="in_context", **SMALL | knobs),
}


def base(kind, **knobs):
    torch.manual_seed(0)
    return randomised(BASES[kind](**knobs))


def inputs(count=2):
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(count, 4, 8, 8, generator=g), torch.linspace(900, 10, count)
    return x, t, {"context": torch.randn(count, 5, 12, generator=g)}


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_untrained_it_changes_no_bit(kind):
    net = base(kind)
    x, t, cond = inputs()
    expected = net(x, t, **cond)
    both = joined(net, controlnet(net, 8, num_blocks=2))
    given, _ = both.conditions([hint(2)], (64, 64), 2)
    assert torch.equal(both(x, t, **cond, **given), expected)
    assert torch.equal(both(x, t, **cond), expected)


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_each_copy_adds_to_its_block(kind):
    """Eq. of Fig. 5 (b): block i's output plus the zero layer of copy i's; without the hint the copies are the base."""
    net = base(kind)
    control = randomised(controlnet(net, 8, num_blocks=2))
    x, t, cond = inputs()
    both = joined(net, control)
    given, _ = both.conditions([hint(2)], (64, 64), 2)
    h, c, ending = net.enter(x, t, **cond)
    blocks = []
    for block in net.blocks[:2]:
        h = block(h, *c)
        blocks.append(h)
    silent = [torch.zeros_like(encoded) for encoded in given["hints"]]
    for residual, zero, out in zip(control.steer(x, t, silent, cond), control.zero_linears, blocks, strict=True):
        assert torch.allclose(residual, zero(out), atol=1e-6)
    h, c, ending = net.enter(x, t, **cond)
    for block, residual in zip(net.blocks, [*control.steer(x, t, given["hints"], cond), 0], strict=True):
        h = block(h, *c) + residual
    tokens = net.final(h[:, :16], *ending)
    expected = net(x, t, **cond, residuals=control.steer(x, t, given["hints"], cond))
    assert torch.allclose(both(x, t, **cond, **given), expected, atol=1e-6)
    assert torch.allclose(tokens.square().mean(), expected.square().mean(), rtol=1e-4)  # the same, as patches
    assert not torch.allclose(expected, net(x, t, **cond), atol=1e-3)


def test_copies_of_pixart_delta():
    """13 of 28 blocks, whose halves are what the paper trains beside the frozen network; nothing is shared."""
    with torch.device("meta"):
        net = PixArt(4, 4096)
        control = controlnet(net, 8)
    assert len(control.trunk.blocks) == len(control.zero_linears) == 13 and isinstance(control.trunk.final, nn.Identity)
    assert len(net.blocks) == 28 and not isinstance(net.final, nn.Identity)
    linears = 13 * (1152 * 1152 + 1152)
    blocks = sum(parameters(block) for block in net.blocks[:13])
    entry = sum(parameters(part) for part in (net.patch_embed, net.embed, net.text_mlp, net.modulation))
    assert parameters(control) == blocks + entry + linears + parameters(control.hint_encoder)
    assert len(control.hint_encoder) // 2 == 5  # 8 pixels per latent and 2 latents per patch are 4 halvings
    small = base("pixart").requires_grad_(False)
    copied = controlnet(small, 8)
    assert all(p.requires_grad for p in copied.parameters())
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in copied.parameters()}


def test_what_does_not_fit_is_refused():
    net = base("pixart")
    x, t, cond = inputs()
    with pytest.raises(ConfigError, match="got 4 residuals, but the PixArt has 3 blocks"):
        net(x, t, **cond, residuals=[torch.zeros(2, 16, 16)] * 4)
    with pytest.raises(ConfigError, match="num_blocks=4: expected 1 to 3, the blocks of the base"):
        ControlNetTransformer(net, num_blocks=4)
    with pytest.raises(ConfigError, match="this ControlNetTransformer is for another base"):
        joined(base("pixart", width=32), controlnet(net, 8))
    with pytest.raises(ConfigError, match="a ControlNetTransformer steers a DiT or a PixArt, the base is a UNet"):
        joined(tiny(), controlnet(net, 8))
    with pytest.raises(ConfigError, match="there is no ControlNet for a Conv2d"):
        controlnet(nn.Conv2d(3, 3, 1), 8)
    both = joined(net, ControlNetTransformer(net, num_blocks=1, hint_widths=[16, 32, 96, 256]))
    given, _ = both.conditions([hint()], (64, 64), 2)
    with pytest.raises(ConfigError, match="the encoded hint is 8x8, the patches are 4x4: .* one more of hint_widths"):
        both(x, t, **cond, **given)
