"""Where what is not a number came from, and what helps: a black picture tells nobody."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.utils.errors import NonFiniteError


def check_finite(x: Tensor, what: str, networks: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """NonFiniteError where x is not finite: it names the weights that are not either, or says what else to try.

    networks: those that x was computed by, under their names for people, in `dtype`.
    """
    if x.isfinite().all():
        return
    for name, net in networks.items():
        if odd := [key for key, tensor in net.state_dict().items() if not tensor.isfinite().all()]:
            count = f"{len(odd)} of its tensors, {odd[0]} first"
            raise NonFiniteError(f"{what}: the weights of the {name} are not finite ({count}); get an undamaged file")
    names = " and the ".join(networks)
    if dtype == torch.float16:
        raise NonFiniteError(f"{what}: the {names} overflows in float16; draw with dtype=bf16 or dtype=fp32")
    advice = "lower guidance.scale, or take more steps or another sampler"
    advice = f"draw with dtype=fp32, or {advice}" if dtype == torch.bfloat16 else advice
    raise NonFiniteError(f"{what}, though the weights of the {names} are; {advice}")


def check_drawn(x: Tensor, objective: Any) -> Tensor:
    """What a sampler made of the noise. Raises NonFiniteError, whose text is `check_finite`'s."""
    networks = {"network": objective.denoiser, "conditioner": objective.conditioner}
    check_finite(x, "what was drawn is not finite", networks, objective.denoiser.dtype or torch.float32)
    return x
