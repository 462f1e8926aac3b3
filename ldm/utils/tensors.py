"""Small tensor helpers that need nothing but torch."""

from torch import Tensor


def pad_dims(t: "Tensor | float", x: Tensor) -> "Tensor | float":
    """Append axes of size one until t (B,) broadcasts against x (B ...); numbers and 0-d tensors pass through."""
    if not isinstance(t, Tensor) or t.ndim == 0:
        return t
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
