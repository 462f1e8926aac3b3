"""Weights as published: `load_model`, `save_model` and `load_system`, imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.weights.load import load_model, save_model
    from ldm.weights.systems import load_system

__all__ = ["load_model", "load_system", "save_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ldm.weights' has no attribute '{name}'")
    return getattr(import_module(f"ldm.weights.{'systems' if name == 'load_system' else 'load'}"), name)
