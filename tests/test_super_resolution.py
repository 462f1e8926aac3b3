"""The super-resolution objective: what is shown small, how it is noised and cropped; the guidance of high scales."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.data.shapes import Shapes
from ldm.diffusion import guidance, prediction, process, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.super_resolution import AUG_LEVEL, SuperResolutionObjective, enlarge, shrink
from ldm.io.images import write_png
from ldm.metrics.augmentation import AugLevels
from ldm.metrics.saturation import Saturation
from ldm.metrics.super_resolution import Enlarged, SuperResolution, bicubic
from ldm.models.codec import PixelCodec
from ldm.models.efficient_unet import EfficientUNet
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.seeding import BatchNoise, Noise

SHAPE = (4, 3, 16, 24)


class Net(nn.Module):
    """Remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 3, 1)

    def forward(self, x, t, low_res, aug_level):
        self.seen = {"x": x, "t": t, "low_res": low_res, "aug_level": aug_level}
        return self.conv(torch.cat([x, low_res], 1))


class NoConditions(nn.Module):
    fields = frozenset()

    def forward(self, batch, key=None):
        return {}


def objective(net=None, p=None, conditioner=None, **knobs):
    torch.manual_seed(0)
    denoiser = Denoiser(net or Net(), p or process.VPCosine(), prediction.V())
    parts = PixelCodec(), conditioner or NoConditions(), times.uniform, weighting.unit
    return SuperResolutionObjective(denoiser, *parts, **{"factor": 4, **knobs})


def images(count=4, size=(16, 24)):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batch(positions=(0, 1, 2, 3), **more):
    return {"image": images()[list(positions)], "position": torch.tensor(positions) + 100, **more}


# --- training -------------------------------------------------------------------------------------------------------


def test_the_image_is_made_small_enlarged_and_noised_by_its_own_level():
    o = objective()
    o(batch())
    seen, level = o.denoiser.net.seen["low_res"], o.denoiser.net.seen["aug_level"]
    plain = enlarge(shrink(images(), 4), (16, 24))
    eps = BatchNoise(0, "condition", batch()["position"])(plain)
    alpha, sigma = (a[:, None, None, None] for a in process.VPCosine()(level))
    torch.testing.assert_close(seen, alpha * plain + sigma * eps)
    assert level.shape == (4,) and level.unique().numel() == 4 and level.min() >= 0 and level.max() <= 1


def test_levels_are_even_over_their_range_and_not_those_of_x_t():
    o, drawn, times_ = objective(levels=(0.2, 0.6)), [], []
    for start in range(0, 400, 4):
        o({"image": images(), "position": torch.arange(start, start + 4)})
        drawn.append(o.denoiser.net.seen["aug_level"]), times_.append(o.denoiser.net.seen["t"] / 1000)
    level, t = torch.cat(drawn), torch.cat(times_)
    assert 0.2 <= level.min() < 0.21 and 0.59 < level.max() <= 0.6
    assert level.mean() == pytest.approx(0.4, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([level, t]))[0, 1]) < 0.12


def test_without_augmentation_the_network_sees_the_small_image_as_it_is():
    o = objective(levels=(0.0, 0.0))
    o(batch())
    assert torch.equal(o.denoiser.net.seen["aug_level"], torch.zeros(4))
    torch.testing.assert_close(o.denoiser.net.seen["low_res"], enlarge(shrink(images(), 4), (16, 24)))


@pytest.mark.parametrize("crop", [None, 8])
def test_an_image_is_treated_alike_in_every_batch(crop):
    o = objective(crop=crop)
    whole, _ = o(batch())
    seen = o.denoiser.net.seen
    for k in range(4):
        o(batch((k,)))
        for name, values in o.denoiser.net.seen.items():
            torch.testing.assert_close(values[0], seen[name][k])
    assert torch.equal(whole, o(batch())[0])


def test_crops_are_the_same_place_of_both_and_every_place():
    y, x = torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij")
    ramp = torch.stack([y * 10, x * 10, y * 0]).to(torch.uint8)  # says where it was cut out
    o, corners = objective(factor=2, crop=8, levels=(0.0, 0.0)), set()
    for start in range(0, 1500, 100):
        several = {"image": ramp.expand(100, -1, -1, -1), "position": torch.arange(start, start + 100)}
        x0 = o.latents(several)
        assert x0.shape == (100, 3, 8, 8)
        low_res = o.image_conditions(several, x0.shape, BatchNoise(0, "condition", several["position"]))["low_res"]
        assert (low_res - x0)[:, :, 2:-2, 2:-2].abs().max() < 0.09  # a ramp made small and large again is a ramp
        where = (x0[:, :2, 0, 0] * 127.5 + 127.5).div(10).round().int().tolist()
        corners |= {tuple(corner) for corner in where}
    assert len(corners) == 9 * 17


def test_a_crop_sees_what_the_whole_image_would():
    several = batch()
    whole = enlarge(shrink(images(), 4), (16, 24))
    o = objective(crop=8, levels=(0.0, 0.0))
    patch = o.image_conditions(several, (4, 3, 8, 8), None)["low_res"]
    torch.testing.assert_close(patch, o.cropped(whole, several["position"]))


def test_an_efficient_unet_learns_from_it():
    net = EfficientUNet(3, channels=[16, 32], num_res_blocks=[1, 1], attention=[False, True], num_heads=2, groups=8)
    o = objective(net, factor=2, crop=8)
    loss, logs = o(batch())
    loss.backward()
    assert loss.isfinite() and set(logs) == {"loss", "mse"}
    assert net.conv_out.weight.grad.abs().sum() > 0


# --- sampling -------------------------------------------------------------------------------------------------------


def test_what_is_given_is_enlarged_with_the_level_that_is_asked_for():
    o, small = objective(), images(4, (4, 6))
    cond = o.image_conditions({"image": small, "aug_level": 0.3}, SHAPE, Noise([5, 6, 7, 8]))
    alpha, sigma = process.VPCosine()(0.3)
    expected = alpha * enlarge(small, (16, 24)) + sigma * Noise([5, 6, 7, 8])(torch.empty(SHAPE))
    torch.testing.assert_close(cond["low_res"], expected)
    torch.testing.assert_close(cond["aug_level"], torch.full((4,), 0.3))
    alone = o.image_conditions({"image": small[2:3], "aug_level": 0.3}, (1, *SHAPE[1:]), Noise([7]))
    torch.testing.assert_close(alone["low_res"][0], cond["low_res"][2])


def test_one_image_serves_several_seeds():
    cond = objective().image_conditions({"image": images(1, (4, 6)), "aug_level": 0.5}, SHAPE, Noise([1, 2, 3, 4]))
    assert cond["low_res"].shape == SHAPE and not torch.equal(cond["low_res"][0], cond["low_res"][1])


def test_the_level_where_none_is_asked_for():
    small = {"image": images(4, (4, 6))}
    for knobs, expected in (({}, AUG_LEVEL), ({"levels": (0.0, 0.0)}, 0.0)):
        level = objective(**knobs).image_conditions(small, SHAPE, Noise([1, 2, 3, 4]))["aug_level"]
        torch.testing.assert_close(level, torch.full((4,), expected))


def test_a_level_of_a_table_is_the_index_the_network_is_fed():
    p = process.cosine(1000)
    o = objective(p=p)
    alpha, sigma = o.noise_of(torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(alpha.square().double(), p.alpha_bars[[0, 250, 999]], rtol=1e-5, atol=1e-7)


def test_corners_lie_on_corners_where_asked_for():
    small = images(1, (4, 6))
    x = small.float() / 127.5 - 1
    assert torch.equal(enlarge(small, (16, 24), align_corners=True)[..., 0, 0], x[..., 0, 0])
    batch = {"image": small, "aug_level": 0.0}
    aligned = objective(align_corners=True).image_conditions(batch, (1, 3, 16, 24), Noise([0]))
    torch.testing.assert_close(aligned["low_res"], F.interpolate(x, (16, 24), mode="bilinear", align_corners=True))


def test_both_halves_of_guidance_see_the_same_noised_image():
    o, x = objective(), torch.randn(SHAPE)
    extra = o.image_conditions({"image": images(4, (4, 6)), "aug_level": 0.3}, SHAPE, Noise([5, 6, 7, 8]))
    guidance.cfg(o.denoiser, extra, dict(extra), scale=3.0)(x, 0.5)
    cond, null = o.denoiser.net.seen["low_res"].chunk(2)
    assert torch.equal(cond, null) and torch.equal(cond, extra["low_res"])


# --- resizing -------------------------------------------------------------------------------------------------------


def test_shrinking_is_antialiased_and_enlarging_keeps_what_is_flat():
    stripes = (torch.arange(16) % 2 * 255).to(torch.uint8).expand(1, 3, 16, 16)
    assert shrink(stripes, 4)[..., 1:-1].abs().max() < 0.1  # grey, neither black nor white
    flat = torch.full((1, 3, 8, 8), 64, dtype=torch.uint8)
    torch.testing.assert_close(enlarge(shrink(flat, 4), (8, 8)), torch.full((1, 3, 8, 8), 64 / 127.5 - 1))


# --- metric ---------------------------------------------------------------------------------------------------------


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"image": images(6)[index], "caption": f"picture {index}"}


def test_the_metric_compares_with_bicubic():
    o, asked = objective(), []

    def perfect(prompts, seeds, small, aug_level):
        asked.append((prompts, small.shape, aug_level))
        return images(6)

    scores = SuperResolution(6, aug_level=0.2)(perfect, Data(), o)
    assert asked == [([""] * 6, (6, 3, 4, 6), 0.2)]
    assert scores["psnr"] == 100 and scores["gain"] == 100 - scores["bicubic_psnr"] and 5 < scores["bicubic_psnr"] < 40
    same = SuperResolution(6)(lambda p, s, small, level: bicubic(small, images(6)), Data(), o)
    assert same["gain"] == 0
    rows, labels = Enlarged(2)(lambda p, s, small, level: images(2), Data(), o)
    assert rows.shape == (8, 3, 16, 24) and labels[:4] == ["given", "bicubic", "model", "image"]


def test_levels_are_compared_on_true_images_and_on_drawn_ones(tmp_path):
    """A stage that is right up to level 0.1, and above it draws the next picture, keeps its score just until there."""
    data = Shapes(32, length=8, split="held_out", jitter=0.0)
    truth, prompts = torch.stack([data[i]["image"] for i in range(8)]), list(data.captions())
    (tmp_path / "drawn").mkdir()
    for number in range(8):
        image = Shapes(16, length=8, split="held_out", jitter=0.0)[7 - number]["image"]
        write_png(tmp_path / "drawn" / f"{number}.png", image, {"prompt": prompts[7 - number]})
    write_png(tmp_path / "grid.png", image)
    small = []

    def draw(prompts_, seeds, given, level):
        small.append(given)
        images = truth[[prompts.index(prompt) for prompt in prompts_]]
        return images if level <= 0.1 else images.roll(1, 0)

    class Captions(NoConditions):
        fields = frozenset({"caption"})

    scores = AugLevels([0.1, 0.3], 8, str(tmp_path))(draw, data, objective(conditioner=Captions(), factor=2))
    assert [tuple(x.shape) for x in small] == [(8, 3, 16, 16)] * 4 and not torch.equal(small[0], small[1])
    assert scores["true_0.1/psnr"] == 100 and scores["true_0.3/psnr"] < 20
    assert scores["true_0.1/prompt_accuracy"] == scores["drawn_0.1/prompt_accuracy"] == 1
    assert scores["true_0.3/prompt_accuracy"] < 0.5 and scores["drawn_0.3/prompt_accuracy"] < 0.5
    with pytest.raises(DataError, match="nowhere holds no images of sample.py"):
        AugLevels(drawn=str(tmp_path / "nowhere"))(draw, data, objective(conditioner=Captions(), factor=2))


def test_saturation_counts_values_at_the_ends_and_true_shapes_have_none():
    data = Shapes(32, length=8, split="held_out")
    truth = torch.stack([data[i]["image"] for i in range(8)])
    assert Saturation(8)(lambda prompts, seeds: truth, data, None) == {"saturation": 0}
    half = truth.clone()
    half[:, :, :8], half[:, :, 8:16] = 0, 255
    assert Saturation(8)(lambda prompts, seeds: half, data, None) == {"saturation": 0.5}
    assert Saturation(8, limit=1.1)(lambda prompts, seeds: half, data, None) == {"saturation": 0}


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs, message",
    [({"factor": 1}, "factor=1"), ({"levels": (0.5, 0.1)}, "levels=.0.5, 0.1."), ({"levels": (0.0, 1.5)}, "levels"),
     ({"crop": 0}, "crop=0")],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message) as error:
        objective(**knobs)
    assert "\n" not in str(error.value)


def test_images_that_do_not_fit_are_refused():
    o = objective()
    with pytest.raises(DataError, match="enlarges images and was given none"):
        o.image_conditions({}, SHAPE, Noise([0]))
    with pytest.raises(DataError, match="an image of 8x8 pixels enlarged 4 times is not 16x24"):
        o.image_conditions({"image": images(1, (8, 8))}, SHAPE, Noise([0]))
    with pytest.raises(ConfigError, match="aug_level=1.2 must lie between 0"):
        o.image_conditions({"image": images(4, (4, 6)), "aug_level": 1.2}, SHAPE, Noise([0]))
    with pytest.raises(DataError, match="needs the images themselves"):
        o({"moments": torch.zeros(4, 6, 4, 6), "position": torch.arange(4)})
    with pytest.raises(DataError, match="cannot be made 5 times smaller"):
        objective(factor=5)(batch())
    with pytest.raises(DataError, match="crop=32 does not fit in an image of 16x24"):
        objective(crop=32)(batch())


# --- guidance whose scale changes -----------------------------------------------------------------------------------


class Flat(nn.Module):
    """x0 = value, whatever x is; counts how often both halves ran."""

    def __init__(self):
        super().__init__()
        self.pairs = 0

    def forward(self, x, t, *, value):
        self.pairs += len(value) > 1
        return value[:, None, None, None].expand_as(x)


def guided(rule, ts, **knobs):
    """The scale at each of these times: cond is 1 and null 0, so x0 is the scale."""
    denoiser = Denoiser(Flat(), process.VPCosine(), prediction.X0())
    denoise = rule(denoiser, {"value": torch.ones(1)}, {"value": torch.zeros(1)}, **knobs)
    return [round(denoise(torch.zeros(1, 3, 2, 2), t).mean().item(), 5) for t in ts], denoiser.net.pairs


def test_a_linear_scale_rises_as_noise_goes():
    scales, _ = guided(guidance.cfg_linear, [1.0, 0.75, 0.5, 0.25, 0.0], scale=5.0)
    assert scales == [1, 3, 5, 7, 9]


def test_an_oscillating_scale_is_high_then_high_and_low_in_turns():
    ts = [1.0, 0.95, 0.9, 0.8, 0.7, 0.7, 0.6, 0.5]  # 0.7 is asked for twice, as Heun does
    scales, pairs = guided(guidance.cfg_oscillating, ts, scale=15.0)
    assert scales == [15, 15, 15, 1, 15, 15, 1, 15] and pairs == 6  # at scale 1 one half is enough
    assert guided(guidance.cfg_oscillating, [0.8, 0.7], scale=15.0, low=2.0)[0] == [2, 15]


def test_a_constant_scale_is_what_it_was():
    assert guided(guidance.cfg, [0.9, 0.1], scale=3.0, interval=(0.2, 1.0)) == ([3, 1], 1)
