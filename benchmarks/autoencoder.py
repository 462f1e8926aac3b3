"""Stable Diffusion's autoencoder beside diffusers': encoding and decoding 256 px images, and the memory that takes.

diffusers' weights are copied into ours, and the outputs compared before anything is timed: in float32 with diffusers',
in bfloat16 both with diffusers' in float32. Memory is the peak above what the process held before the call (`VmHWM`,
Linux), every network alone in a fresh process.
"""

import copy
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from harness import arguments, assert_equal, interleave
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.codec import DTYPES, LatentCodec
from ldm.weights.autoencoder import from_diffusers

WIDTH, MULT = 128, (1, 2, 4, 4)  # of SD 1.x, 2.x and XL: 83.7M parameters
NETWORKS = ("ldm", "diffusers", "diffusers nhwc")
PRECISIONS = ("fp32", "bf16")
PAGES = str(1 << 20)  # larger tensors are mapped: what is measured is not what malloc holds back for later


def make_peer(width: int, precision: str) -> nn.Module:
    from diffusers import AutoencoderKL as Peer

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    peer = Peer(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[width * mult for mult in MULT],
        layers_per_block=2,
    )
    return peer.eval().to(DTYPES[precision])


def make_ours(width: int, precision: str, peer: nn.Module | None = None) -> AutoencoderKL:
    """The autoencoder as a codec holds it, with the peer's weights."""
    ours = AutoencoderKL(channels=width)
    if peer is not None:
        ours.load_state_dict(from_diffusers(peer.state_dict(), ours.state_dict()))
    return LatentCodec(ours, precision=precision).autoencoder


def nhwc(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)


def call(name: str, job: str, net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """One evaluation of network `name`: both give the moments, or the image."""
    if name == "ldm":
        return lambda: torch.cat(net.encode(x), 1) if job == "encode" else net.decode(x)
    x = nhwc(x) if "nhwc" in name else x
    return lambda: net.encode(x).latent_dist.parameters if job == "encode" else net.decode(x).sample


def inputs(job: str, precision: str, side: int) -> Tensor:
    shape = (1, 3, side, side) if job == "encode" else (1, 4, side // 8, side // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[precision])


def timing(job: str, precision: str, args) -> None:
    """Ours, and diffusers in both of its memory layouts."""
    width, side = (64, 64) if args.small else (WIDTH, 256)
    peer, x = make_peer(width, "fp32"), inputs(job, precision, side)
    ours = make_ours(width, precision, peer)
    with torch.inference_mode():
        truth = call("diffusers", job, peer, x.float())()
        peer = peer.to(DTYPES[precision])
        nets = {"ldm": ours, "diffusers": peer, "diffusers nhwc": nhwc(copy.deepcopy(peer))}
        cases = {name: call(name, job, net, x) for name, net in nets.items()}
        errors = compare(precision, *(cases[name]() for name in NETWORKS), truth)
        timed = interleave(cases, rounds=2 if args.small else args.rounds or 5, warmup=0)
    timed.report(f"autoencoder/{job}/{precision}", "ldm", NETWORKS[1:], target=0.95, **errors)


def compare(precision: str, ours: Tensor, peer: Tensor, peer_nhwc: Tensor, truth: Tensor) -> dict[str, float]:
    """Equal in float32. In bfloat16 random weights put either 0.024 from float32: ours no farther than diffusers."""
    if precision == "fp32":
        return {"error": assert_equal(ours, truth, tol=1e-4)}
    error, *peers = (((out.float() - truth).norm() / truth.norm()).item() for out in (ours, peer, peer_nhwc))
    assert error <= 1.05 * max(peers), f"ours is {error:.2e} from float32, the peer {max(peers):.2e}: nothing is timed"
    return {"error": error, "peer_error": max(peers)}


def memory(job: str, precision: str, args) -> None:
    """Megabytes that a call needs above the weights; diffusers' needs fewer with channels last."""
    width, side = (64, 64) if args.small else (WIDTH, 256)
    peer = "diffusers nhwc"
    peaks = {name: isolated(peak, name, job, precision, width, side) for name in ("ldm", peer)}
    line = {"bench": f"autoencoder/{job}/{precision}/memory", "case": "ldm", "peer": peer}
    line |= {"ratio": round(peaks["ldm"] / peaks[peer], 4), "target": 0.8, "megabytes": peaks}
    print(json.dumps(line), flush=True)


def isolated(function: Callable, *args):
    """The function's result, from a fresh process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = PAGES  # read by glibc when a process starts
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak(name: str, job: str, precision: str, width: int, side: int) -> float:
    torch.set_num_threads(1)
    net = make_ours(width, precision) if name == "ldm" else make_peer(width, precision)
    net = nhwc(net) if "nhwc" in name else net
    with torch.inference_mode():
        call(name, job, net, inputs(job, precision, side // 4))()  # loads what torch loads lazily
        case = call(name, job, net, inputs(job, precision, side))
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again
        case()
    return round(resident("VmHWM") - before, 1)


def resident(field: str) -> float:
    """Megabytes (2^20) of a field of this process's status."""
    with open("/proc/self/status") as file:
        kilobytes = next(line.split()[1] for line in file if line.startswith(field))
    return int(kilobytes) / 1024


def main() -> None:
    args = arguments(__doc__)
    for job in ("encode", "decode"):
        for precision in PRECISIONS:
            for name, case in {f"{job} {precision} memory": memory, f"{job} {precision} time": timing}.items():
                if args.only in name:
                    case(job, precision, args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
