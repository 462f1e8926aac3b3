"""What cannot be, said in words before anything is computed: numbers that do not fit, conditions nobody asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.utils.errors import ConfigError


def check_sizes(sample_size: int, patch_size: int, width: int, num_heads: int) -> None:
    """ConfigError for numbers of a transformer over patches that do not divide each other."""
    if sample_size % patch_size:
        raise ConfigError(f"sample_size={sample_size} does not split into patches of patch_size={patch_size}")
    if width % num_heads or width % 4:
        raise ConfigError(f"width={width} must be a multiple of num_heads={num_heads}, and of 4 for the positions")


def check_condition(network: str, name: str, value: Tensor | None, wanted: int | None, knob: str) -> None:
    """ConfigError unless the network was built for this condition exactly when it is given, in the right width."""
    if value is None and wanted:
        raise ConfigError(f"the {network} was built with {knob}={wanted} but got no `{name}`: pass it, or unset {knob}")
    if value is not None and not wanted:
        raise ConfigError(
            f"the {network} got `{name}` {tuple(value.shape)} but has no use for it: drop it, or set {knob}"
        )
    if value is not None and value.ndim > 1 and value.shape[-1] != wanted:
        raise ConfigError(f"`{name}` has width {value.shape[-1]}, but the {network} was built with {knob}={wanted}")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """ConfigError for a class that does not exist; `num_classes` itself is the null class."""
    if is_readable(labels) and (wrong := labels[(labels < 0) | (labels > num_classes)]).numel():
        raise ConfigError(
            f"`labels` holds {wrong[0].item()}, expected 0 to {num_classes - 1}, or {num_classes} for no class"
        )


def check_context(network: str, context: Tensor | None, mask: Tensor | None, context_dim: int | None) -> None:
    """ConfigError unless the text (B L D) is as `check_condition` wants it, and its mask (B L) keeps some of each."""
    check_condition(network, "context", context, context_dim, "context_dim")
    if context is None:
        check_condition(network, "context_mask", mask, None, "context_dim")
    elif mask is not None and mask.shape != context.shape[:2]:
        raise ConfigError(f"`context_mask` is {tuple(mask.shape)}, expected {tuple(context.shape[:2])} as `context`")
    elif mask is not None and is_readable(mask) and not (kept := mask.any(dim=1)).all():
        raise ConfigError(
            f"`context_mask` drops every token of text {kept.logical_not().nonzero()[0].item()}: keep at least one, "
            "such as the end mark of an empty text"
        )


def check_residuals(network: str, residuals: Sequence[Tensor], depth: int) -> None:
    """ConfigError for more of them than there are blocks."""
    if len(residuals) > depth:
        raise ConfigError(f"got {len(residuals)} residuals, but the {network} has {depth} blocks to add them to")


def is_readable(x: Tensor) -> bool:
    """Whether looking at values costs nothing; on a GPU it would wait for all work, and encoders have looked before."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
