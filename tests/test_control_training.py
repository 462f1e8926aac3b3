"""Training a ControlNet beside a frozen base: which gradients come first, and that it learns to obey its hint."""

import pytest
import torch

from ldm.adapters.control_objective import ControlObjective
from ldm.adapters.training import attach
from ldm.conditioning.conditioner import Conditioner
from ldm.diffusion import prediction, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.models.codec import PixelCodec
from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet
from ldm.utils.errors import DataError
from tests.test_controlnet import FLOW, TINY, hint, inputs, joined, tiny


def test_gradients_reach_the_zero_convolutions_first_and_then_the_copy():
    """Eq. (2) to (4) of the paper: at step 0 only the last layers have a gradient; two steps later, all."""
    net = tiny().requires_grad_(False)
    control = ControlNet(net)
    both = joined(net, control)
    x, t, cond = inputs()
    optimizer = torch.optim.SGD(control.parameters(), lr=0.1)
    sizes = []
    for _ in range(3):
        given, _ = both.conditions([hint(2)], (64, 64), 2)
        both(x, t, **cond, **given).square().mean().backward()
        parts = control.zero_convs[0].weight, control.encoder.levels[0].blocks[0].res.conv1.weight
        sizes.append([float(p.grad.abs().max()) for p in (*parts, control.hint_encoder[0].weight)])
        optimizer.step()
        optimizer.zero_grad()
    assert sizes[0][0] > 0 and sizes[0][1:] == [0, 0]
    assert sizes[1][1] > 0
    assert all(size > 0 for size in sizes[2])
    assert all(p.grad is None for p in net.parameters())


def halves(position, swap=False):
    """Pictures of which the upper or the lower half is white, and what tells which: (images, hints)."""
    images = torch.zeros(len(position), 3, 8, 8, dtype=torch.uint8)
    lower = position % 2 == (0 if swap else 1)
    images[lower, :, 4:], images[~lower, :, :4] = 255, 255
    return images


def batch(step, size=16):
    position = torch.arange(step * size, (step + 1) * size)
    return {"image": halves(position), "position": position, "step": step}


def parts():
    known = {"density": times.uniform, "weighting": weighting.unit}
    return {"codec": PixelCodec(), "conditioner": Conditioner({}), **known}


def test_it_learns_to_obey_its_hint_and_the_base_stays():
    torch.manual_seed(0)
    net = UNet(**TINY | {"in_channels": 3, "context_dim": None, "depth": [0, 0, 0]})
    base = DiffusionObjective(Denoiser(net, FLOW, prediction.Flow()), **parts())

    def train(objective, steps):
        moving = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(moving, lr=2e-3)
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            loss, _ = objective(batch(step))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses[-20:]) / 20, moving

    alone, _ = train(base, 120)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    control = ControlNet(net, hint_widths=[16])
    denoiser = Denoiser(net, FLOW, prediction.Flow())
    objective = ControlObjective(denoiser, annotate=lambda images: images, **parts())
    attach(objective, {"controlnet": control})
    steered, moving = train(objective, 80)
    assert {id(p) for p in moving} == {id(p) for p in control.parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert steered < 0.7 * alone
    true = batch(1000, 64)
    wrong = {**true, "hint": halves(true["position"], swap=True)}
    with torch.no_grad():
        right, misled, nothing = (objective(b)[0].item() for b in (true, wrong, {**true, "hint": 0 * true["image"]}))
    assert right < 0.5 * misled and right < nothing


def test_training_data_without_images_is_refused_and_sampling_without_a_hint_is_the_base():
    net = tiny()
    denoiser = Denoiser(joined(net, ControlNet(net)), FLOW, prediction.Flow())
    objective = ControlObjective(denoiser, annotate=None, **parts())
    objective.codec.downsample = 8
    with pytest.raises(DataError, match="the data has only latents"):
        objective.image_conditions({"position": torch.zeros(2)}, (2, 4, 8, 8), None)
    assert objective.image_conditions({}, (2, 4, 8, 8), None) == {}
    assert len(objective.image_conditions({"hint": hint()}, (2, 4, 8, 8), None)["hints"]) == 1
