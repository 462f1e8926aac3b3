"""How much may be made of a description by somebody else, counted while it is made on the `meta` device."""

import torch
from torch.overrides import TorchFunctionMode

from ldm.utils.errors import WeightsError


class Budget(TorchFunctionMode):
    """Within `with torch.device("meta"), Budget(...)`: WeightsError as soon as more bytes or operations are asked for.

    Nothing is allocated on `meta`, so that terabytes are refused before a byte of them is taken.
    """

    def __init__(self, *, max_bytes: int, max_calls: int):
        super().__init__()
        self.bytes, self.calls = max_bytes, max_calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(result is argument for argument in args):
            self.bytes -= result.numel() * result.element_size()
        self.calls -= 1
        if self.bytes < 0 or self.calls < 0:
            raise WeightsError("it describes a network many times as large as the tensors that come with it")
        return result
