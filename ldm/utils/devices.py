"""Which device a run uses."""

import torch

from ldm.utils.errors import ConfigError


def pick_device(name: str) -> str:
    """`auto` is the accelerator if there is one; anything else must be there. Raises ConfigError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device={name} is not known; use auto, cpu, cuda or mps")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise ConfigError(f"device={name} was asked for but this machine has none; use device=auto")
    return name
