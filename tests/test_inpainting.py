"""Masks, the inpainting objective, and weights for a network with more inputs than the file has."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.data.masks import strokes_and_boxes
from ldm.diffusion import prediction, process, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.inpainting import InpaintingObjective
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.codec import LatentCodec, PixelCodec
from ldm.models.unet import UNet
from ldm.utils.errors import ConfigError, DataError, WeightsError
from ldm.utils.seeding import Noise, keys, randn_like
from ldm.weights.expand import expand_input

KEYS = keys(0, "mask", torch.arange(400))


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (96, 32)])
def test_masks_cover_what_they_should(size):
    masks = strokes_and_boxes(KEYS, *size)
    assert masks.shape == (400, 1, *size) and masks.dtype == torch.bool
    share = masks.float().mean((1, 2, 3))
    full = (share == 1).float().mean()
    assert full == pytest.approx(0.25, abs=0.06)
    partial = share[share < 1]
    assert partial.min() > 0 and partial.max() < 0.85
    assert partial.mean() == pytest.approx(0.23, abs=0.05) and partial.std() > 0.08


def test_every_place_is_masked_sometimes():
    partial = strokes_and_boxes(KEYS, 32, 32, full=0.0).float().mean((0, 1))
    assert partial.min() > 0.05 and partial.max() < 0.5


def test_a_mask_is_a_function_of_its_key():
    masks = strokes_and_boxes(KEYS[:20], 40, 56)
    assert torch.equal(strokes_and_boxes(KEYS[7:9], 40, 56), masks[7:9])
    assert not torch.equal(masks, strokes_and_boxes(KEYS[20:40], 40, 56))


def test_a_mask_is_the_same_drawing_at_every_size():
    small, large = (strokes_and_boxes(KEYS[:50], side, side).float() for side in (64, 128))
    assert (F.avg_pool2d(large, 2) - small).abs().mean() < 0.03


@pytest.mark.parametrize("full, expected", [(0.0, False), (1.0, True)])
def test_the_share_of_full_masks(full, expected):
    assert bool(strokes_and_boxes(KEYS[:30], 16, 16, full=full).all()) == expected
    with pytest.raises(ConfigError, match="masks.full=1.5"):
        strokes_and_boxes(KEYS, 16, 16, full=1.5)


def test_tiny_masks_are_never_empty():
    assert strokes_and_boxes(KEYS, 8, 8).flatten(1).any(1).all()


# --- the objective --------------------------------------------------------------------------------------------------


class Pool(nn.Module):
    """A codec that shows what it was given: the mean of every 4 x 4 pixels, and noise where it is asked for."""

    channels, downsample = 3, 4

    def encode(self, images, generator=None):
        x = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
        z = F.avg_pool2d(x, 4)
        return z if generator is None else z + randn_like(z, generator)


class Net(nn.Module):
    def __init__(self, channels=7):
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, 1)

    def forward(self, x, t, image):
        self.seen = image
        return self.conv(torch.cat([x, image], 1))


class NoConditions(nn.Module):
    def forward(self, batch, key=None):
        return {}


def objective(codec=None):
    torch.manual_seed(0)
    denoiser = Denoiser(Net(), process.linear(), prediction.Eps())
    return InpaintingObjective(denoiser, codec or Pool(), NoConditions(), times.uniform, weighting.unit,
                               strokes_and_boxes)  # fmt: skip


def images(count=4, size=(16, 24)):
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batch(positions=(0, 1, 2, 3), **more):
    return {"image": images()[list(positions)], "position": torch.tensor(positions) + 100, **more}


SHAPE = (4, 3, 4, 6)


def test_mask_then_latents_of_the_masked_picture():
    mask = (torch.rand(4, 1, 16, 24, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    seen = objective().image_conditions({"image": images(), "mask": mask}, SHAPE, None)["image"]
    x = (images().float() / 127.5 - 1) * (mask < 0.5)
    assert torch.equal(seen[:, :1], mask[:, :, ::4, ::4])  # nearest, as it was trained
    assert torch.equal(seen[:, 1:], F.avg_pool2d(x, 4))
    soft = torch.where(mask > 0, 0.5, 0.49)
    assert torch.equal(objective().image_conditions({"image": images(), "mask": soft}, SHAPE, None)["image"], seen)


def test_what_is_hidden_cannot_be_seen():
    o, mask = objective(), torch.zeros(4, 1, 16, 24)
    mask[:, :, 4:12] = 1
    other = images()
    other[:, :, 4:12] = 255 - other[:, :, 4:12]
    a, b = (o.image_conditions({"image": x, "mask": mask}, SHAPE, None)["image"] for x in (images(), other))
    assert torch.equal(a, b) and (a[:, 1:, 1:3] == 0).all()


def test_one_picture_serves_the_whole_batch_with_its_own_noise_for_each():
    mask = torch.zeros(1, 1, 16, 24)
    seen = objective().image_conditions({"image": images(1), "mask": mask}, SHAPE, Noise([5, 6, 7, 8]))["image"]
    assert seen.shape == (4, 4, 4, 6) and not torch.equal(seen[0], seen[1])
    alone = objective().image_conditions({"image": images(1), "mask": mask}, (1, *SHAPE[1:]), Noise([7]))["image"]
    assert torch.equal(alone[0], seen[2])
    mode = objective().image_conditions({"image": images(1), "mask": mask}, SHAPE, None)["image"]
    assert mode.shape == (4, 4, 4, 6) and torch.equal(mode[0], mode[3])


def test_without_a_picture_everything_is_repainted():
    seen = objective().image_conditions({}, SHAPE, None)["image"]
    assert (seen[:, 0] == 1).all() and (seen[:, 1:] == 0).all()
    seen = objective().image_conditions({"image": images()}, SHAPE, None)["image"]
    assert (seen[:, 0] == 1).all() and (seen[:, 1:] == 0).all()


def test_training_draws_masks_that_belong_to_the_images():
    o = objective()
    whole, _ = o(batch())
    seen = o.denoiser.net.seen
    masks = strokes_and_boxes(keys(0, "mask", torch.arange(100, 104)), 16, 24).float()
    assert torch.equal(seen[:, :1], masks[:, :, ::4, ::4])
    for k in range(4):
        o(batch((k,)))
        assert torch.equal(o.denoiser.net.seen[0], seen[k])
    o(batch(mask=torch.zeros(4, 1, 16, 24)))
    assert (o.denoiser.net.seen[:, 0] == 0).all()
    assert torch.equal(whole, o(batch())[0])


def test_channels_that_the_network_gets():
    assert InpaintingObjective.image_channels(Pool()) == 4
    assert InpaintingObjective.image_channels(PixelCodec()) == 4


def test_pictures_that_do_not_fit_are_refused():
    o = objective()
    with pytest.raises(DataError, match="the mask is 16x16 pixels, but what is inpainted is 16x24"):
        o(batch(mask=torch.zeros(4, 1, 16, 16)))
    with pytest.raises(DataError, match="the image is 16x24 pixels, but what is inpainted is 16x16"):
        o.image_conditions({"image": images()}, (4, 3, 4, 4), None)
    with pytest.raises(DataError, match="needs the images themselves"):
        o.image_conditions({"moments": torch.zeros(4, 6, 4, 6), "position": torch.arange(4)}, SHAPE, None)


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_the_codecs_take_the_masked_picture(kind):
    torch.manual_seed(0)
    net = AutoencoderKL(3, 8, [1, 1], 1, 4, attention=False, groups=4, patch=2)
    codec = PixelCodec() if kind == "pixel" else LatentCodec(net, scale=0.5)
    o, f = objective(codec), codec.downsample
    shape = (4, codec.channels, 16 // f, 24 // f)
    unmasked = o.image_conditions({"image": images(), "mask": torch.zeros(4, 1, 16, 24)}, shape, None)["image"]
    assert torch.equal(unmasked[:, 1:], codec.encode(images()))
    grey = o.image_conditions({}, shape, None)["image"][:, 1:]
    assert torch.equal(grey[:1], codec.encode(torch.zeros(1, 3, 16, 24)))


# --- weights --------------------------------------------------------------------------------------------------------


def unet(in_channels=4, seed=0):
    torch.manual_seed(seed)
    net = UNet(in_channels, out_channels=4, channels=32, channel_mult=[1, 2], num_res_blocks=1, depth=[0, 1, 1],
               head_dim=16, context_dim=8)  # fmt: skip
    for parameter in net.parameters():  # what starts at zero too
        nn.init.normal_(parameter, std=0.05)
    return net.eval()


@torch.no_grad()
def test_new_channels_change_nothing_at_first():
    net = unet()
    x, t, context = torch.randn(2, 4, 8, 12), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 8)
    before = net(x, t, context=context)
    wide = expand_input(copy.deepcopy(net), 9)
    assert torch.equal(wide(x, t, context=context, image=torch.randn(2, 5, 8, 12)), before)
    assert wide.in_channels == 9 and wide.encoder.conv_in.weight.shape == (32, 9, 3, 3)
    assert sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in net.parameters()) == 5 * 32 * 9
    again = UNet(9, out_channels=4, channels=32, channel_mult=[1, 2], num_res_blocks=1, depth=[0, 1, 1], head_dim=16,
                 context_dim=8)  # fmt: skip
    again.load_state_dict(wide.state_dict())
    with pytest.raises(WeightsError, match="in_channels=9, expected at most 4"):
        expand_input(wide, 4)


def test_new_channels_learn():
    wide = expand_input(unet(), 9)
    x, image, context = torch.randn(1, 4, 8, 8), torch.ones(1, 5, 8, 8), torch.randn(1, 5, 8)
    wide(x, torch.zeros(1), context=context, image=image).sum().backward()
    assert wide.encoder.conv_in.weight.grad[:, 4:].abs().sum() > 0
