"""What a trace of torch.fx leaves replaced when it is interrupted while it puts things back.

torch.fx keeps the object that does its replacements in ``CURRENT_PATCHER``, and sets it back
last: a Ctrl-C just before that leaves it for good, and perhaps ``nn.Module.__call__`` too.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

from torch import fx
from torch.fx import _symbolic_trace

__all__ = ["Trace", "is_tracing_here", "mend", "undo", "was_begun_elsewhere"]

_fx: Any = _symbolic_trace


class Trace:
    """A trace of torch.fx that is known from its beginning.

    Attributes:
        thread: The thread that traces; ``None``: it is over.
    """

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()

    def of(self, patcher: Any) -> Any:
        """The object that does its replacements, which is known by that from now on."""
        patcher._trace_behind_gate = self
        return patcher


def is_tracing_here() -> bool:
    """Whether the running thread is in a trace of torch.fx, begun by whomever."""
    return _traces_in(sys._getframe()) > 0


def was_begun_elsewhere() -> bool:
    """Whether another thread is in a trace that is not known from its beginning.

    Looks into other threads' frames, which keeps alive what those are about to drop; torch.export
    counts on that it does not live. So this is for traces of which nothing else is known.
    """
    patcher = getattr(_fx, "CURRENT_PATCHER", None)
    if patcher is None or hasattr(patcher, "_trace_behind_gate") or is_tracing_here():
        return False
    this = threading.get_ident()
    frames = sys._current_frames()
    return any(thread != this and _traces_in(frames[thread]) for thread in frames)


def mend(traces_here: int = 0) -> None:
    """Undo what was left by a trace that is over.

    Args:
        traces_here: In so many traces the running thread may be that have replaced nothing yet.
    """
    patcher = getattr(_fx, "CURRENT_PATCHER", None)
    if patcher is None or _traces_in(sys._getframe()) > traces_here:
        return
    trace = getattr(patcher, "_trace_behind_gate", None)
    if trace is None:
        is_over = not traces_here and not was_begun_elsewhere()
    else:
        is_over = trace.thread in (None, threading.get_ident())
    if is_over:
        undo(patcher)
        _fx.CURRENT_PATCHER = None


def undo(patcher: Any) -> None:
    """Put back whatever a patcher of torch.fx has replaced and not put back."""
    for replaced in reversed(patcher.patches_made):
        place, name = replaced.frame_dict, replaced.fn_name
        contents = vars(place) if isinstance(place, type) else place
        if contents.get(name) is replaced.new_fn:
            replaced.revert()


def _traces_in(frame: FrameType | None) -> int:
    """How many traces of torch.fx a frame is part of."""
    count = 0
    while frame is not None:
        count += frame.f_code is fx.Tracer.trace.__code__
        frame = frame.f_back
    return count
