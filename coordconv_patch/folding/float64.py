"""New tensors in float64, where folding code asks for no dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from coordconv_patch.running.untouched import LOOK

__all__ = ["NewTensorsInFloat64", "default_float64"]

_FACTORIES = frozenset(
    {
        *(torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.eye),
        *(torch.linspace, torch.logspace, torch.rand, torch.randn),
    }
)
"""What makes new tensors of the default dtype, whatever its other arguments are."""

_CONVERSIONS = frozenset({torch.arange, torch.full, torch.scalar_tensor, torch.tensor})
"""What makes new tensors of the default dtype where its arguments are floats."""


class NewTensorsInFloat64(TorchFunctionMode):
    """While entered, new tensors of this thread get float64 where no dtype is asked for.

    A difference of float32 weights would lose digits. torch's default dtype is one for all
    threads, and would change what their models compute.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        # None is what torch.nn's layers pass on for the default.
        if given.get("dtype") is None and "out" not in given:
            if func in _FACTORIES:
                given["dtype"] = torch.float64
            elif func in _CONVERSIONS:
                tensor = func(*args, **given)
                if tensor.dtype is not torch.get_default_dtype():
                    return tensor
                given["dtype"] = torch.float64
        return func(*args, **given)


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    """As :class:`NewTensorsInFloat64`, for whatever makes a tensor, but in every thread."""
    with LOOK:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
