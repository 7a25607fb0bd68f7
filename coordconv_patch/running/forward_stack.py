"""Which modules' forwards the running thread is in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FrameType

from torch import nn

__all__ = ["modules_in_forward"]

_CALL = nn.Module._call_impl.__code__


def modules_in_forward() -> Iterator[nn.Module]:
    """The modules whose forward is on this thread's stack, innermost first, each once."""
    seen: set[int] = set()
    frame = inspect.currentframe()
    while frame is not None:
        module = _module_in_forward(frame)
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
        frame = frame.f_back


def _module_in_forward(frame: FrameType) -> nn.Module | None:
    """The module whose forward a frame runs; ``None`` if it runs something else."""
    code = frame.f_code
    if code.co_argcount == 0 or (code.co_name != "forward" and code is not _CALL):
        return None
    module = frame.f_locals.get(code.co_varnames[0])
    return module if isinstance(module, nn.Module) else None
