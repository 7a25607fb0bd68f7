"""The torch function modes of this package, set aside while it runs a part of a model itself.

They watch what a model computes, or add coordinates to it; what the package runs for a look is
neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["own_modes_set_aside"]


@contextmanager
def own_modes_set_aside() -> Iterator[None]:
    """While entered, no torch function mode of this package is active in this thread.

    Others stay: a model may need them, such as that of ``torch.set_default_device``.
    """
    before = _emptied()
    _fill([mode for mode in before if not _is_own(mode)])
    try:
        yield
    finally:
        _emptied()
        _fill(before)


def _emptied() -> list[TorchFunctionMode]:
    """Take all modes off the stack; returns them, outermost first."""
    depth = torch._C._len_torch_function_stack()
    return [torch._C._pop_torch_function_stack() for _ in range(depth)][::-1]


def _fill(modes: list[TorchFunctionMode]) -> None:
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def _is_own(mode: TorchFunctionMode) -> bool:
    return type(mode).__module__.partition(".")[0] == "coordconv_patch"
