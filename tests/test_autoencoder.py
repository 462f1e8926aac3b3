"""The autoencoder, its codecs, the discriminator, LPIPS, and the objective that trains them."""

import math

import pytest
import torch
import yaml
from torch import nn

from ldm.models.autoencoder import AutoencoderKL, kl_divergence
from ldm.models.codec import LatentCodec, PixelCodec, to_float, to_uint8
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.perceptual import LPIPS, STAGES
from ldm.nn.convolution import Conv2d, Downsample, ResBlock, Upsample, affine, norm_silu_conv
from ldm.training.autoencoder import GAMES, Adversary, AutoencoderObjective, l2, psnr
from ldm.training.optim import adamw
from ldm.utils.errors import ConfigError, DataError, NonFiniteError, WeightsError
from ldm.utils.seeding import Noise
from ldm.weights.autoencoder import from_diffusers, from_original, to_diffusers, to_original


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def network(name: str) -> dict:
    """The settings of a shipped network and of the files it builds on."""
    with open(f"configs/network/{name}.yaml") as file:
        node = yaml.safe_load(file)
    merged = {}
    for base in node.pop("defaults", []):
        merged |= node if base == "_self_" else network(base)
    merged |= node
    assert merged["_target_"] == "ldm.models.autoencoder.AutoencoderKL"
    return merged


def build(name: str, **changes) -> AutoencoderKL:
    settings = {**network(name), **changes}
    settings.pop("_target_")
    return AutoencoderKL(**settings)


def tiny(seed: int = 0, **changes) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**{"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "groups": 4, **changes})


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch_of(images: torch.Tensor, step: int = 0) -> dict:
    return {"image": images, "position": torch.arange(len(images)), "step": step}


# Convolution leaves


def test_denoisers_block_starts_as_its_skip_and_an_autoencoders_does_not():
    x, emb = noise(2, 8, 5, 7), noise(2, 6)
    assert torch.equal(ResBlock(8, 8, 6, groups=4)(x, emb), x)
    assert not torch.equal(ResBlock(8, 8, groups=4)(x), x)
    assert ResBlock(8, 12, 6, groups=4)(x, emb).shape == (2, 12, 5, 7)


def test_residual_block_gradients_without_and_with_embedding():
    torch.manual_seed(0)
    for emb_dim in (None, 3):
        block = ResBlock(2, 4, emb_dim, groups=2).double()
        nn.init.normal_(block.conv2.weight)
        x = noise(1, 2, 2, 3).double().requires_grad_()
        emb = noise(1, 3).double().requires_grad_()
        assert torch.autograd.gradcheck(block, (x, emb) if emb_dim else (x,))


def test_residual_block_is_the_same_with_and_without_gradients_and_keeps_its_input():
    block, x, emb = ResBlock(8, 12, 6, groups=4), noise(2, 8, 5, 7), noise(2, 6)
    nn.init.normal_(block.conv2.weight)
    before = x.clone()
    with torch.no_grad():
        fast = block(x, emb)
    assert torch.equal(fast, block(x, emb)) and torch.equal(x, before)


@pytest.mark.parametrize("height", [1, 32, 45, 96])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_large_image_in_strips_is_the_whole_image(monkeypatch, height, dtype, tol):
    monkeypatch.setattr("ldm.nn.convolution.MANY_VALUES", 0)
    norm, conv = nn.GroupNorm(4, 8, eps=1e-6), Conv2d(8, 6, 3, padding=1).to(memory_format=torch.channels_last)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (5 + 3 * noise(2, 8, height, 7)).to(dtype).to(memory_format=torch.channels_last)
    norm, conv = norm.to(dtype), conv.to(dtype)
    whole = norm_silu_conv(norm, conv, x)
    with torch.no_grad():
        strips = norm_silu_conv(norm, conv, x)
        scale, shift = affine(norm, x)
    assert strips.is_contiguous(memory_format=torch.channels_last) and strips.dtype == dtype
    torch.testing.assert_close(strips, whole.detach(), rtol=0, atol=tol * whole.abs().max().item())
    torch.testing.assert_close((x.float() * scale + shift).to(dtype), norm(x).detach(), rtol=tol, atol=tol)


def test_asymmetric_downsampling_pads_right_and_bottom():
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = 1.0
    for asymmetric, tap in ((False, (1, 1)), (True, (0, 0))):
        down = Downsample(1, asymmetric=asymmetric)
        expected = down.conv.weight[0, 0][tap] + down.conv.bias
        torch.testing.assert_close(down(x)[0, 0, 0, 0], expected[0])


def test_upsampling_reaches_an_odd_size():
    up = Upsample(2)
    assert up(noise(1, 2, 3, 5)).shape == (1, 2, 6, 10)
    assert up(noise(1, 2, 3, 5), (5, 9)).shape == (1, 2, 5, 9)


def test_upsampling_by_transposed_convolution_is_nearest_then_convolution():
    up, x = Upsample(2), noise(2, 2, 32, 34).requires_grad_()
    slow = up.conv(nn.functional.interpolate(x, scale_factor=2.0))
    for fast in (up(x), up(x.detach()), up(x, (64, 68))):
        torch.testing.assert_close(fast, slow)
    expected = torch.autograd.grad(slow.square().sum(), [x, *up.parameters()])
    found = torch.autograd.grad(up(x).square().sum(), [x, *up.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)  # sums over 2176 positions


def test_groups_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match="24 channels do not split into the 32 groups"):
        ResBlock(24, 24)


# The autoencoder


def test_published_sizes():
    with torch.device("meta"):
        vae = build("sd_vae")
        parts = [count(part) for part in (vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv)]
        assert parts == [34_163_592, 49_490_179, 72, 20] and count(vae) == 83_653_863
        assert count(build("sd_vae", latent_channels=16, quant_conv=False)) == 83_819_683
        assert (vae.latent_channels, vae.downsample) == (4, 8)
        norms = [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]
        assert {norm.eps for norm in norms} == {1e-6} and len(norms) == 52


@pytest.mark.parametrize("changes", [{}, {"quant_conv": False, "attention": False}, {"patch": 2, "latent_channels": 3}])
def test_shapes_and_limits(changes):
    vae = tiny(**changes)
    f = vae.downsample
    mean, logvar = vae.encode(noise(2, 3, 2 * f, 3 * f))
    assert mean.shape == logvar.shape == (2, vae.latent_channels, 2, 3)
    assert vae.decode(mean).shape == (2, 3, 2 * f, 3 * f)
    with pytest.raises(ConfigError, match=f"image size {2 * f}x{2 * f + 1} is not divisible.*{f}"):
        vae.encode(noise(1, 3, 2 * f, 2 * f + 1))


def test_log_variance_is_clamped():
    vae = tiny()
    nn.init.constant_(vae.quant_conv.bias, 1e3)
    assert vae.encode(noise(1, 3, 4, 4))[1].max() == 20
    nn.init.constant_(vae.quant_conv.bias, -1e3)
    assert vae.encode(noise(1, 3, 4, 4))[1].min() == -30


def test_kl_is_the_closed_form():
    mean, logvar = noise(3, 2, 2), noise(3, 2, 2, seed=1)
    q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum((1, 2))
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


@pytest.mark.parametrize("there, back", [(to_diffusers, from_diffusers), (to_original, from_original)])
def test_published_names_round_trip(there, back):
    state = tiny(channel_mult=(1, 1, 2)).state_dict()
    published = there(state)
    assert len(published) == len(state) + 8  # two weights and two biases are three each there
    returned = back(published, state)
    assert returned.keys() == state.keys() and all(torch.equal(returned[key], state[key]) for key in state)
    published["first.weight"] = published.pop(next(iter(published)))
    with pytest.raises(WeightsError, match="missing 1 .*unknown 1"):
        back(published, state)


def test_original_layout_counts_the_decoder_from_full_resolution_and_attends_by_convolution():
    published = to_original(tiny(channel_mult=(1, 1, 2)).state_dict())
    assert published["decoder.up.1.upsample.conv.weight"].shape == (8, 8, 3, 3)
    assert published["decoder.up.1.block.0.nin_shortcut.weight"].shape == (8, 16, 1, 1)
    assert published["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert published["encoder.mid.attn_1.norm.weight"].shape == (16,)
    with torch.device("meta"):
        assert len(to_original(build("sd_vae").state_dict())) == 248


# Codecs


def test_every_byte_survives_the_pixel_codec():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    codec = PixelCodec()
    x = codec.encode(images)
    assert x.min() == -1 and x.max() == 1 and (codec.channels, codec.downsample) == (3, 1)
    assert torch.equal(codec.decode(x), images)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_luminance_codec_keeps_grey_and_weighs_colours():
    codec = PixelCodec(channels=1)
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(codec.decode(codec.encode(grey)), grey.expand(1, 3, 16, 16))
    green = torch.tensor([0, 255, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert codec.decode(codec.encode(green)).flatten().tolist() == [150] * 3  # 0.587 * 255


def test_codecs_refuse_what_they_cannot_encode():
    with pytest.raises(ConfigError, match="channels=4"):
        PixelCodec(4)
    with pytest.raises(DataError, match="images are torch.float64"):
        PixelCodec().encode(noise(1, 3, 4, 4).double())
    with pytest.raises(ConfigError, match="scale has 3 numbers"):
        LatentCodec(tiny(), scale=[1.0, 2.0, 3.0])


def test_latents_are_scaled_and_shifted_and_decode_undoes_it():
    vae, images = tiny(), pictures(2, 3, 8, 12)
    scale, shift = [1.0, 2.0, 3.0, 4.0], 0.5
    codec = LatentCodec(vae, scale, shift)
    mode, logvar = vae.encode(to_float(images))
    torch.testing.assert_close(codec.encode(images), (mode - 0.5) * torch.tensor(scale).view(4, 1, 1))
    assert torch.equal(codec.decode(codec.encode(images)), to_uint8(vae.decode(mode)))
    z = mode + (0.5 * logvar).exp() * Noise([3, 4])(mode)
    torch.testing.assert_close(codec.encode(images, Noise([3, 4])), (z - 0.5) * torch.tensor(scale).view(4, 1, 1))
    assert not codec.train().autoencoder.training and not any(p.requires_grad for p in codec.parameters())


def test_latents_stay_float32_under_autocast():
    codec, images = LatentCodec(tiny()), pictures(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        x = codec.encode(images)
        images_out = codec.decode(x)
    assert x.dtype == torch.float32 and torch.equal(x, codec.encode(images))
    assert torch.equal(images_out, codec.decode(x))


def test_moments_are_what_encoding_draws_from():
    codec, images = LatentCodec(tiny(), 0.5, 0.1), pictures(3, 3, 8, 12)
    moments = codec.moments(images)
    assert moments.shape == (3, 8, 4, 6) and moments.dtype == torch.float32
    assert moments.is_contiguous() and codec.decode(codec.draw(moments)).is_contiguous()  # whatever it computes in
    torch.testing.assert_close(moments, torch.cat(tiny().encode(to_float(images)), 1))
    assert torch.equal(codec.draw(moments), codec.encode(images))
    assert torch.equal(codec.draw(moments, Noise([1, 2, 3])), codec.encode(images, Noise([1, 2, 3])))


@pytest.mark.parametrize("precision, tol", [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_is_close_and_gives_float32_latents(precision, tol):
    half, full, images = LatentCodec(tiny(), precision=precision), LatentCodec(tiny()), pictures(2, 3, 8, 8)
    x = half.encode(images)
    assert x.dtype == torch.float32 and next(half.autoencoder.parameters()).dtype != torch.float32
    torch.testing.assert_close(x, full.encode(images), rtol=tol, atol=tol)
    apart = half.decode(x).int() - full.decode(x).int()
    assert apart.abs().max() <= 255 * tol


def overflowing() -> AutoencoderKL:
    """The same function in float32, but inside it numbers beyond float16's 65504 where the input is bright."""
    vae = tiny()
    with torch.no_grad():
        for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
            conv.weight *= 3e5
    return vae


def test_images_that_overflow_in_float16_take_float32(capsys):
    safe, exact = LatentCodec(overflowing(), precision="fp16"), LatentCodec(overflowing().half().float())
    images = pictures(2, 3, 8, 8)
    images[0] = 127  # black, white and noise overflow; grey does not
    with torch.inference_mode():
        raw = torch.cat(safe.autoencoder.encode(to_float(images).half()), 1)
        assert raw[0].isfinite().all() and not raw[1].isfinite().all()
        moments = safe.moments(images)
        torch.testing.assert_close(moments[1:], exact.moments(images[1:]))
        assert torch.equal(moments[:1], safe.moments(images[:1]))  # an image does not depend on its batch
        z = noise(2, 4, 4, 4) * torch.tensor([1e-3, 30.0]).view(2, 1, 1, 1)
        assert torch.equal(safe.decode(z)[1], exact.decode(z)[1])
    assert capsys.readouterr().err.count("overflows in float16") == 1
    assert {p.dtype for p in safe.autoencoder.parameters()} == {torch.float16}


def test_no_black_image_of_latents_that_are_not_numbers():
    with pytest.raises(NonFiniteError, match="latents to decode are not finite"):
        LatentCodec(tiny()).decode(torch.full((1, 4, 4, 4), torch.nan))
    with pytest.raises(ConfigError, match="precision=fp8 is not known"):
        LatentCodec(tiny(), precision="fp8")


@pytest.mark.parametrize("per_channel", [True, False])
def test_measured_latents_are_standardised(per_channel):
    codec = LatentCodec.measured(tiny(), pictures(96, 3, 8, 8).split(40), per_channel=per_channel)
    x = codec.encode(pictures(96, 3, 8, 8), torch.Generator().manual_seed(0))
    axes = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    assert x.mean(axes).abs().max() < 0.1 and (x.std(axes) - 1).abs().max() < 0.1
    assert len(codec.scale.unique()) == (4 if per_channel else 1)
    again = LatentCodec(tiny())
    again.load_state_dict(codec.state_dict())
    assert torch.equal(again.encode(pictures(2, 3, 8, 8)), codec.encode(pictures(2, 3, 8, 8)))


# Discriminator and LPIPS


def test_discriminator_is_the_70_pixel_patchgan():
    with torch.device("meta"):
        discriminator = PatchDiscriminator()
        assert count(discriminator) == 2_765_633
        assert discriminator(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    x = noise(1, 3, 96, 96).requires_grad_()
    logits = PatchDiscriminator(channels=2).eval()(x)
    logits[0, 0, 5, 5].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def lpips_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for stage, convs in enumerate(STAGES):
        for index, c_in, c_out in convs:
            tensors[f"features.{index}.weight"] = torch.randn(c_out, c_in, 3, 3) * math.sqrt(2 / (9 * c_in))
            tensors[f"features.{index}.bias"] = torch.zeros(c_out)
        tensors[f"lin{stage}.model.1.weight"] = torch.rand(1, convs[-1][2], 1, 1)
    return tensors


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS(lpips_weights())


def test_lpips_is_zero_for_equal_images_and_reaches_them_with_gradients(lpips):
    x, y = noise(2, 3, 16, 16).requires_grad_(), noise(2, 3, 16, 16, seed=1)
    assert torch.equal(lpips(y, y), torch.zeros(2))
    distance = lpips(x, y)
    torch.testing.assert_close(distance, lpips(y, x))
    distance.sum().backward()
    assert (distance > 0).all() and x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_lpips_weights_are_frozen_complete_and_outside_checkpoints(lpips):
    heads = [tensor for name, tensor in lpips.named_buffers() if name.startswith("head")]
    assert sum(head.numel() for head in heads) == 1472
    assert count(lpips) == 0 and not lpips.state_dict()
    weights = lpips_weights()
    del weights["lin3.model.1.weight"]
    with pytest.raises(WeightsError, match=r"LPIPS: head_3 should be \(1, 512, 1, 1\), found nothing"):
        LPIPS(weights)


# The objective


def adversarial(start: int = 0, game: str = "hinge", **knobs) -> AutoencoderObjective:
    torch.manual_seed(1)
    adversary = Adversary(channels=4, num_layers=2, start=start, game=game)
    return AutoencoderObjective(tiny(), discriminator=adversary, **knobs)


def gradients(module: nn.Module) -> list[torch.Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def test_loss_is_its_parts():
    objective = AutoencoderObjective(tiny(), kl_weight=0.25, reconstruction=l2)
    loss, logs = objective(batch_of(pictures(2, 3, 8, 8)))
    assert loss.item() == pytest.approx((logs["reconstruction"] + 0.25 * logs["kl"] / (3 * 8 * 8)).item())
    assert set(objective.state_dict()) == {f"autoencoder.{key}" for key in tiny().state_dict()} | {"logvar"}


def test_loss_is_the_originals_per_value(lpips):
    """Its sum over C H W of the pixels' error and the broadcast LPIPS, and the KL, divided by C H W."""
    objective = AutoencoderObjective(tiny(), perceptual=lpips, perceptual_weight=0.5, kl_weight=1e-2, learn_logvar=True)
    nn.init.constant_(objective.logvar, 0.3)
    batch = batch_of(pictures(2, 3, 16, 16))
    x, x_hat = to_float(batch["image"]), reconstruction(objective, batch)
    error = (x - x_hat).abs() + 0.5 * lpips(x_hat, x).view(2, 1, 1, 1)
    nll = (error / math.exp(0.3) + 0.3).sum() / 2
    kl = kl_divergence(*objective.autoencoder.encode(x)).sum() / 2
    torch.testing.assert_close(objective(batch)[0], (nll + 1e-2 * kl) / (3 * 16 * 16))


def test_posterior_noise_depends_on_position_alone():
    objective, images = AutoencoderObjective(tiny(), seed=5), pictures(3, 3, 8, 8)
    whole = objective(batch_of(images))[1]["reconstruction"]
    alone = [
        objective({"image": images[i : i + 1], "position": torch.tensor([i]), "step": 9})[1]["reconstruction"]
        for i in range(3)
    ]
    torch.testing.assert_close(whole, torch.stack(alone).mean())


def test_one_backward_gives_each_side_its_own_gradient():
    """The discriminator gets the hinge loss alone, the autoencoder gets nothing from it."""
    batch = batch_of(pictures(2, 3, 16, 16))
    both = adversarial()
    loss, logs = both(batch)
    loss.backward()
    x = to_float(batch["image"])

    judge = adversarial()
    x_hat = reconstruction(judge, batch).detach()
    network = judge.discriminator.network
    network(x_hat)  # the generator's pass: only moves the running statistics
    real, fake = network(x), network(x_hat)
    (0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())).backward()
    for ours, expected in zip(gradients(both.discriminator), gradients(judge.discriminator), strict=True):
        torch.testing.assert_close(ours, expected)

    maker = adversarial()
    x_hat = reconstruction(maker, batch)
    likelihood, fooled = (x_hat - x).abs().sum() / 2, -maker.discriminator.network(x_hat).mean()  # a sum, as published
    last = maker.autoencoder.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (likelihood, fooled)]
    weight = norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(logs["adaptive_weight"], weight.clamp(max=1e4))
    kl = kl_divergence(*maker.autoencoder.encode(x)).mean()
    ((likelihood + 1e-6 * kl + 0.5 * logs["adaptive_weight"] * fooled) / x[0].numel()).backward()
    for ours, expected in zip(gradients(both.autoencoder), gradients(maker.autoencoder), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_adaptive_weight_is_clamped_and_a_constant():
    objective = adversarial()
    nn.init.zeros_(objective.discriminator.network.layers[-1].weight)  # a generator's gradient of zero
    loss, logs = objective(batch_of(pictures(2, 3, 16, 16)))
    assert logs["adaptive_weight"] == 1e4 and not logs["adaptive_weight"].requires_grad
    loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(objective.autoencoder))


def test_running_statistics_of_the_discriminator_do_not_matter():
    """So ranks need not exchange them: batch norm uses its own batch in training."""
    batch, objective = batch_of(pictures(2, 3, 16, 16)), adversarial()
    loss = objective(batch)[0]
    for buffer in objective.discriminator.buffers():
        buffer.fill_(7)
    assert torch.equal(objective(batch)[0], loss)


def reconstruction(objective: AutoencoderObjective, batch: dict) -> torch.Tensor:
    """The reconstruction whose error the objective measures, caught on its way out of the decoder."""
    caught = []
    hook = objective.autoencoder.decoder.register_forward_hook(lambda module, args, out: caught.append(out))
    knobs = objective.discriminator
    objective.discriminator = None
    objective(batch)
    objective.discriminator = knobs
    hook.remove()
    return caught[0]


def test_adversary_waits_for_its_step():
    objective, batch = adversarial(start=10), batch_of(pictures(2, 3, 16, 16), step=9)
    loss, logs = objective(batch)
    assert "discriminator" not in logs and torch.equal(loss, AutoencoderObjective(tiny())(batch)[0])
    loss.backward()
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(objective.discriminator))  # not None
    assert "discriminator" in objective(batch_of(pictures(2, 3, 16, 16), step=10))[1]


@pytest.mark.parametrize("game", GAMES)
def test_every_game_pushes_the_two_sides_apart(game):
    fake, real = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    GAMES[game](fake, real).backward()
    assert (real.grad < 0).all() and (fake.grad >= 0).all()  # descent raises the logits of real images
    fake.grad = None
    GAMES[game](fake).backward()
    assert (fake.grad < 0).all()  # and the generator those of its own


def entropy(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of two distributions over the same few values."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()


@pytest.mark.parametrize("p, q", [([1, 3, 4], [1, 3, 4]), ([1, 3, 4], [5, 2, 1]), ([4, 4, 0, 0], [0, 0, 5, 3])])
def test_the_minimax_game_at_its_optimum(p, q):
    """Theorem 1 of arXiv:1406.2661: D* = p / (p + q) and V(D*) = 2 JS(p, q) - 2 log 2, in [-1.386294, 0]."""
    p, q = torch.tensor(p) / 8, torch.tensor(q) / 8
    best = (p.log() - q.log()).clamp(-40, 40).requires_grad_()  # the logit of p / (p + q)
    real, fake = (best.repeat_interleave((8 * weight).long()) for weight in (p, q))
    loss = GAMES["vanilla"](fake, real)
    js = 0.5 * (entropy(p, (p + q) / 2) + entropy(q, (p + q) / 2))
    torch.testing.assert_close(-loss, 2 * js - 2 * math.log(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, best)[0], torch.zeros(len(p)), atol=1e-6, rtol=0)
    if torch.equal(p, q):
        assert loss.item() == pytest.approx(1.386294, abs=1e-6)


def test_disjoint_supports_give_the_minimax_generator_no_gradient():
    sure = torch.full((4,), -40.0, requires_grad=True)
    assert math.log(2) == pytest.approx((0.5 * (2 * math.log(2) - GAMES["vanilla"](sure, -sure))).item())  # JS
    assert torch.autograd.grad(GAMES["vanilla"](sure), sure)[0].abs().max() < 1e-15
    torch.testing.assert_close(torch.autograd.grad(GAMES["non_saturating"](sure), sure)[0], torch.full((4,), -0.25))


def test_a_game_and_a_part_that_do_not_exist_are_named():
    with pytest.raises(ConfigError, match="game=poker is not known; use hinge"):
        Adversary(game="poker")
    with pytest.raises(ConfigError, match="train=encoder is not known; use all, decoder"):
        AutoencoderObjective(tiny(), train="encoder")


def test_training_the_decoder_alone_leaves_every_latent_as_it_was(lpips):
    torch.manual_seed(0)
    vae, images = tiny(), pictures(2, 3, 16, 16)
    before = LatentCodec(tiny()).moments(images)
    objective = AutoencoderObjective(vae, train="decoder", reconstruction=l2, perceptual=lpips, perceptual_weight=0.1)
    optimizer = adamw(objective, lr=1e-3)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for part in (vae.decoder, vae.post_quant_conv) for p in part.parameters()}
    losses = []
    for step in range(5):
        loss, _ = objective(batch_of(images, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(LatentCodec(vae).moments(images), before)


def test_lpips_contributes_gradient(lpips):
    batch = batch_of(pictures(1, 3, 16, 16))
    plain, perceptual = AutoencoderObjective(tiny()), AutoencoderObjective(tiny(), perceptual=lpips)
    for objective in (plain, perceptual):
        objective(batch)[0].backward()
    last = [objective.autoencoder.decoder.conv_out.weight.grad for objective in (plain, perceptual)]
    assert not torch.allclose(*last)
    assert not any(key.startswith("perceptual") for key in perceptual.state_dict())


def test_log_variance_of_a_pixel_trains():
    objective = AutoencoderObjective(tiny(), learn_logvar=True)
    loss, logs = objective(batch_of(pictures(2, 3, 8, 8)))
    loss.backward()
    torch.testing.assert_close(objective.logvar.grad, 1 - logs["reconstruction"])  # d(e / exp(s) + s) / ds at s = 0
    optimizer = adamw(objective, lr=1e-2)
    optimizer.step()  # the optimizer has it
    assert objective.logvar != 0 and not AutoencoderObjective(tiny()).logvar.requires_grad


def test_evaluation_under_no_grad_works_with_an_adversary():
    with torch.no_grad():
        loss, logs = adversarial()(batch_of(pictures(2, 3, 16, 16)))
    assert loss.isfinite() and "generator" in logs


def test_psnr():
    images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    rebuilt = torch.stack([images[0], images[1] + 51])
    torch.testing.assert_close(psnr(images, rebuilt), torch.tensor([100.0, 20 * math.log10(5)], dtype=torch.float64))
    assert AutoencoderObjective(tiny()).evaluate(images)["psnr"] < 100


def test_many_images_are_reconstructed_a_few_at_a_time(monkeypatch):
    objective, images, sizes = AutoencoderObjective(tiny()), pictures(9, 3, 8, 8), []
    monkeypatch.setattr("ldm.training.autoencoder.PIXELS", 4 * 8 * 8)
    encode = objective.autoencoder.encode
    monkeypatch.setattr(objective.autoencoder, "encode", lambda x: sizes.append(len(x)) or encode(x))
    assert objective.reconstruct(images).shape == images.shape and sizes == [4, 4, 1]


def test_a_small_autoencoder_and_its_adversary_learn():
    """The error falls before and after the discriminator joins; its logits separate; lambda stays a number."""
    torch.manual_seed(0)
    vae = AutoencoderKL(channels=16, channel_mult=(1, 1), num_res_blocks=1, groups=4, attention=False)
    objective = AutoencoderObjective(vae, discriminator=Adversary(channels=32, num_layers=2, start=20))
    optimizer = adamw(objective, lr=1e-3, betas=(0.5, 0.9), weight_decay=0.0)
    images, logs = pictures(8, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3), []
    for step in range(60):
        loss, parts = objective(batch_of(images, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logs.append({name: value.item() for name, value in parts.items()})
    first, joined, last = (logs[step]["reconstruction"] for step in (0, 20, 59))
    assert joined < 0.7 * first and last < joined
    apart = [parts["logits_real"] - parts["logits_fake"] for parts in logs[20:]]
    assert abs(apart[0]) < 0.5 < max(apart[:10])
    assert all(0 < parts["adaptive_weight"] < 1e4 for parts in logs[20:])


def test_a_small_autoencoder_learns():
    torch.manual_seed(0)
    objective = AutoencoderObjective(build("autoencoder_small", channels=8, groups=4), reconstruction=l2)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    flat = pictures(16, 3, 1, 1).expand(-1, -1, 16, 16)
    before = objective.evaluate(flat)["psnr"]
    for step in range(40):
        objective(batch_of(flat, step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objective.evaluate(flat)["psnr"] > before + 5
