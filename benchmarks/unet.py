"""The conditional UNet beside diffusers' and the pixel UNet beside lucidrains': one evaluation, one training step.

The peer's weights are copied into ours and the outputs compared before anything is timed. Where the two networks
cannot be the same one (other head sizes, lucidrains' architecture) the outputs are not compared, and `work` in the
line, the ratio of the FLOPs counted on the meta device, turns the times into times per FLOP.
"""

import copy
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import arguments, assert_equal, interleave
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.models.unet import UNet
from ldm.weights.unet import diffusers_names, to_ours

logging.getLogger("diffusers").setLevel(logging.ERROR)

SD15 = {"channels": 320, "channel_mult": (1, 2, 4, 4), "depth": (1, 1, 1, 0, 1), "context_dim": 768}
SMALL_SD15 = {**SD15, "channels": 32, "context_dim": 16}
TEXT = {"channels": 64, "channel_mult": (1, 2, 4), "depth": (1, 1, 0, 1), "context_dim": 128}  # 17.8M parameters
SMALL_TEXT = {**TEXT, "channel_mult": (1, 2), "depth": (1, 0, 1)}
HEADS = 8  # in every level, which is what diffusers' attention_head_dim=8 means and does unless told otherwise


def make_pair(sizes: dict) -> tuple[nn.Module, nn.Module]:
    """Ours and diffusers' UNet: same sizes, eight heads a level, the same random weights, shared where not fused."""
    from diffusers import UNet2DConditionModel

    widths = [sizes["channels"] * mult for mult in sizes["channel_mult"]]
    down = [("CrossAttn" if depth else "") + "DownBlock2D" for depth in sizes["depth"][:-1]]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    torch.manual_seed(0)
    peer = UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=sizes["context_dim"],
        attention_head_dim=HEADS,
    )
    with torch.device("meta"):
        ours = UNet(4, head_dim=[width // HEADS for width in widths], linear_projection=False, **sizes)
    ours.load_state_dict(to_ours(peer.state_dict(), diffusers_names(ours.state_dict())), assign=True)
    return ours, peer


def nhwc(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)


# --- C1: an evaluation of SD 1.5 --------------------------------------------------------------------------------------


def evaluation(dtype: torch.dtype, args) -> None:
    """Same weights in ours and in diffusers, which runs in both of its layouts."""
    ours, peer = (net.to(dtype).eval() for net in make_pair(SMALL_SD15 if args.small else SD15))
    side = 16 if args.small else 64
    x, context = torch.randn(1, 4, side, side, dtype=dtype), torch.randn(1, 77, ours.context_dim, dtype=dtype)
    t = torch.tensor([500.0])
    peer_nhwc = nhwc(copy.deepcopy(peer))
    with torch.inference_mode():
        cases = {
            "ldm": lambda: ours(x, t, context=context),
            "diffusers": lambda: peer(x, t, context, return_dict=False)[0],
            "diffusers nhwc": lambda: peer_nhwc(nhwc(x), t, context, return_dict=False)[0],
        }
        error = assert_equal(cases["ldm"](), cases["diffusers"](), tol=1e-4 if dtype == torch.float32 else 2e-2)
        timed = interleave(cases, rounds=2 if args.small else args.rounds or 7, warmup=0)
    target = 0.90 if dtype == torch.float32 else 0.85
    name = f"unet/evaluation/{str(dtype).removeprefix('torch.')}"
    timed.report(name, "ldm", ["diffusers", "diffusers nhwc"], target=target, error=error)


# --- C2: a training step ----------------------------------------------------------------------------------------------


def training_step(net: nn.Module, call: Callable[[], Tensor], target: Tensor) -> Callable[[], None]:
    """Forward, mean squared error, backward, AdamW: the same optimizer on both sides."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        F.mse_loss(call(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def text_training(args) -> None:
    """17.8M parameters, 32x32 latents, batch 4: with the peer's eight heads a level, then with our 64 wide ones."""
    sizes, batch, side = (SMALL_TEXT, 2, 8) if args.small else (TEXT, 4, 32)
    equal, peer = map(copy.deepcopy, make_pair(sizes))  # training must not move the other's weights
    wide = UNet(4, linear_projection=False, **sizes)
    x, target = torch.randn(2, batch, 4, side, side)
    context, t = torch.randn(batch, 77, sizes["context_dim"]), torch.linspace(0, 999, batch)
    peer_nhwc = nhwc(copy.deepcopy(peer))
    calls = {
        "ldm 8 heads": (equal, lambda: equal(x, t, context=context)),
        "ldm head_dim 64": (wide, lambda: wide(x, t, context=context)),
        "diffusers": (peer, lambda: peer(x, t, context, return_dict=False)[0]),
        "diffusers nhwc": (peer_nhwc, lambda: peer_nhwc(nhwc(x), t, context, return_dict=False)[0]),
    }
    error = assert_equal(calls["ldm 8 heads"][1](), calls["diffusers"][1](), tol=1e-4)
    cases = {name: training_step(net, call, target) for name, (net, call) in calls.items()}
    timed = interleave(cases, rounds=2 if args.small else args.rounds or 7)
    peers = ["diffusers", "diffusers nhwc"]
    timed.report("unet/training/text", "ldm 8 heads", peers, target=0.80, error=error)
    timed.report("unet/training/text", "ldm head_dim 64", peers, target=0.55)


def pixel_training(args) -> None:
    """The 9.9M pixel UNet of `denoising-diffusion-pytorch`, 32x32, batch 4, per FLOP: the architectures differ."""
    from denoising_diffusion_pytorch import Unet

    batch, side = (1, 8) if args.small else (4, 32)
    sizes = {"channels": 64, "channel_mult": (1, 2, 4), "num_res_blocks": 1, "depth": (0, 0, 0, 1)}  # 11.0M
    ours, peer = UNet(3, **sizes), Unet(dim=64, dim_mults=(1, 2, 4))
    flash = Unet(dim=64, dim_mults=(1, 2, 4), flash_attn=True)
    x, target = torch.randn(2, batch, 3, side, side)
    t = torch.linspace(0, 999, batch)
    calls = {
        "ldm": (ours, lambda: ours(x, t)),
        "lucidrains": (peer, lambda: peer(x, t)),
        "lucidrains flash": (flash, lambda: flash(x, t)),
    }
    work = flops(calls["ldm"][1]) / flops(calls["lucidrains"][1])
    cases = {name: training_step(net, call, target) for name, (net, call) in calls.items()}
    timed = interleave(cases, rounds=2 if args.small else args.rounds or 7)
    timed.report("unet/training/pixel", "ldm", ["lucidrains", "lucidrains flash"], target=0.85, work=round(work, 4))


def flops(call: Callable[[], Tensor]) -> int:
    """Two per multiply-add, of the forward pass; without oneDNN, whose operators the counter does not know."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        call()
    return counter.get_total_flops()


def main() -> None:
    args = arguments(__doc__)
    for name, case in {
        "evaluation float32": lambda: evaluation(torch.float32, args),
        "evaluation bfloat16": lambda: evaluation(torch.bfloat16, args),
        "training text": lambda: text_training(args),
        "training pixel": lambda: pixel_training(args),
    }.items():
        if args.only in name:
            case()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
