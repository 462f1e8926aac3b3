"""What N LoRAs cost an evaluation of SD 1.5's UNet (C10), beside PEFT in diffusers: unmerged, and merged.

A ratio is that of a network with N adapters to the same one without. `target` is half of PEFT's surcharge on a quiet
machine (1.035, 1.064, 1.119), `peft` what it is in this run. All copies share the weights of the base; the outputs with
all adapters are compared before anything is timed.
"""

import copy
import tempfile
from pathlib import Path

import torch
from harness import arguments, assert_equal, interleave
from safetensors.torch import save_file
from torch import Tensor, nn
from unet import SD15, SMALL_SD15, make_pair

from ldm.adapters.lora import Loaded

RANK = 16
COUNTS = (0, 1, 2, 4)
LIMITS = {1: 1.0175, 2: 1.032, 4: 1.06}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def twin(net: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same weights."""
    return copy.deepcopy(net, {id(p): p for p in net.parameters()})


def with_peft(peer: nn.Module, count: int) -> nn.Module:
    from peft import LoraConfig

    net, names = twin(peer), [f"a{i}" for i in range(count)]
    torch.manual_seed(1)
    for name in names:
        net.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), adapter_name=name)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)
    if names:
        net.set_adapters(names)
    return net.eval()


def with_ours(ours: nn.Module, judge: nn.Module, count: int, folder: Path) -> tuple[nn.Module, list[Loaded]]:
    """The same adapters, by way of files."""
    from peft import get_peft_model_state_dict

    net, adapters = twin(ours), []
    for i in range(count):
        state = get_peft_model_state_dict(judge, adapter_name=f"a{i}")
        save_file({f"unet.{key}": p.contiguous() for key, p in state.items()}, folder / f"a{i}.safetensors")
        adapters.append(Loaded(folder / f"a{i}.safetensors"))
        adapters[-1].inject({"network": net})
    return net.eval(), adapters


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__)
    sizes, side = (SMALL_SD15, 8) if args.small else (SD15, 32)
    ours, peer = (net.eval().requires_grad_(False) for net in make_pair(sizes))
    x, t = torch.randn(1, 4, side, side), torch.tensor([500.0])
    context = torch.randn(1, 77, sizes["context_dim"])
    judges = {count: with_peft(peer, count) for count in COUNTS}
    with tempfile.TemporaryDirectory() as folder:
        nets = {count: with_ours(ours, judges[COUNTS[-1]], count, Path(folder))[0] for count in COUNTS}
        merged, adapters = with_ours(copy.deepcopy(ours), judges[COUNTS[-1]], COUNTS[-1], Path(folder))
    for adapter in adapters:
        adapter.merge()

    def ldm(net: nn.Module) -> Tensor:
        return net(x, t, context=context)

    def peft(net: nn.Module) -> Tensor:
        return net(x, t, context).sample

    expected = peft(judges[COUNTS[-1]])
    error = max(assert_equal(ldm(net), expected, tol=1e-4) for net in (nets[COUNTS[-1]], merged))
    cases = {f"ldm {count}": lambda net=net: ldm(net) for count, net in nets.items()}
    cases |= {f"peft {count}": lambda net=net: peft(net) for count, net in judges.items()}
    cases["ldm merged"] = lambda: ldm(merged)
    no_grad = {name: torch.no_grad()(case) for name, case in cases.items()}
    timed = interleave(no_grad, rounds=2 if args.small else args.rounds or 7)
    for count in COUNTS[1:]:
        theirs = round(timed.ratios(f"peft {count}", "peft 0")[1], 4)
        timed.report(f"lora/{count}", f"ldm {count}", ["ldm 0"], target=LIMITS[count], peft=theirs, error=error)
    timed.report("lora/merged", "ldm merged", ["ldm 0"], target=1.02, error=error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
