"""Weights as published: `load_model` and `save_model`, imported when they are first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.weights.load import load_model, save_model

__all__ = ["load_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ldm.weights' has no attribute '{name}'")
    from ldm.weights import load

    return getattr(load, name)
