"""What each ControlNet adds to an evaluation of its UNet, beside diffusers: C10, cost 1 + s N of N nets.

Same weights on both sides, outputs compared first. `slope` is s = (time with N nets / time with none - 1) / N, median
and quartiles over rounds; its floor is the share of the FLOPs, about 0.35 for Stable Diffusion 1.5. Ours encodes the
hint once per picture, which is reported apart as a share of one evaluation; diffusers does it at every step.
"""

import json
import logging
from statistics import quantiles

import torch
from harness import Times, arguments, assert_equal, interleave
from torch import nn

from ldm.adapters.control import Control, Controlled
from ldm.diffusion.process import linear
from ldm.models.unet import UNet
from ldm.weights import controlnet, formats
from ldm.weights.unet import diffusers_names, to_ours

logging.getLogger("diffusers").setLevel(logging.ERROR)

TARGET = 0.50  # of the slope
NETS = 2
SIZES = {  # widths, sides of the latents
    "sd15": ([320, 640, 1280, 1280], 64),
    "half": ([160, 320, 640, 640], 64),
    "small": ([32, 64, 64, 64], 16),
}


def make(widths: list[int]) -> tuple[nn.Module, list[nn.Module], nn.Module, list[nn.Module]]:
    """Ours and diffusers' UNet, each with its ControlNets: the same random weights, shared where not fused."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(0)
    knobs = {"block_out_channels": widths, "cross_attention_dim": 768, "attention_head_dim": 8}
    peer = UNet2DConditionModel(**knobs).eval()
    peer_nets = [ControlNetModel(**knobs).eval() for _ in range(NETS)]
    for net in peer_nets:
        for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            nn.init.normal_(conv.weight, std=0.02)
    with torch.device("meta"):
        ours = UNet(**formats.unet_from_config(config_of(peer))).eval()
        nets = [controlnet.build(**controlnet.from_config(config_of(net))).eval() for net in peer_nets]
    ours.load_state_dict(to_ours(peer.state_dict(), diffusers_names(ours.state_dict())), assign=True)
    for net, peer_net in zip(nets, peer_nets, strict=True):
        net.load_state_dict(controlnet.from_diffusers(peer_net.state_dict(), net.state_dict()), assign=True)
    return ours, nets, peer, peer_nets


def config_of(net: nn.Module) -> dict:
    return json.loads(net.to_json_string())


def slopes(timed: Times, name: str, count: int) -> list[float]:
    """Lower quartile, median and upper quartile of the cost of one of `count` nets, in evaluations of the UNet."""
    pairs = zip(timed.seconds[f"{name} {count}"], timed.seconds[f"{name} 0"], strict=True)
    found = [(with_nets / alone - 1) / count for with_nets, alone in pairs]
    return [round(s, 3) for s in (quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3)]


def evaluation(size: str, rounds: int) -> None:
    widths, side = SIZES[size]
    ours, nets, peer, peer_nets = make(widths)
    x, context, t = torch.randn(1, 4, side, side), torch.randn(1, 77, 768), torch.tensor([500.0])
    hint = torch.rand(1, 3, 8 * side, 8 * side)

    def with_ours(count: int):
        net = Controlled(ours, [Control(net) for net in nets[:count]], linear())
        given = net.conditions([hint] * count, (8 * side, 8 * side), 1)[0]
        return lambda: net(x, t, context=context, **given)

    def with_peers(count: int):
        def call():
            pairs = [net(x, t, context, hint, return_dict=False) for net in peer_nets[:count]]
            down = [sum(skips) for skips in zip(*(down for down, _ in pairs), strict=True)] or None
            middle = sum(middle for _, middle in pairs) if pairs else None
            return peer(x, t, context, down_block_additional_residuals=down,
                        mid_block_additional_residual=middle, return_dict=False)[0]  # fmt: skip

        return call

    with torch.inference_mode():
        cases = {f"ldm {n}": with_ours(n) for n in range(NETS + 1)}
        cases |= {f"diffusers {n}": with_peers(n) for n in range(NETS + 1)}
        errors = [assert_equal(cases[f"ldm {n}"](), cases[f"diffusers {n}"](), tol=1e-4) for n in range(NETS + 1)]
        cases["hint"] = lambda: nets[0].encode(hint)
        timed = interleave(cases, rounds=rounds, warmup=0)
    hint_share = timed.ratios("hint", "ldm 0")[1]
    for n in range(1, NETS + 1):
        facts = {"target": TARGET, "hint_once": round(hint_share, 4), "error": max(errors)}
        facts |= {"busy_elsewhere": round(timed.busy_elsewhere, 3), "rounds": rounds}
        line = {"bench": f"controlnet/{size}", "nets": n, "slope": slopes(timed, "ldm", n),
                "peer_slope": slopes(timed, "diffusers", n)}  # fmt: skip
        ratio = timed.ratios(f"ldm {n}", f"diffusers {n}")[1]
        print(json.dumps({**line, "ratio": round(ratio, 4), **facts}), flush=True)


def main() -> None:
    args = arguments(__doc__)
    for size in ["small"] if args.small else [size for size in ("sd15", "half") if args.only in size]:
        evaluation(size, rounds=2 if args.small else args.rounds or 7)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
