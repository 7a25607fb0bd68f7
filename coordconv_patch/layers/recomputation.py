"""Whether layers run in a backward pass, and for which gradient checkpoints.

:mod:`torch.utils.checkpoint` runs a region again in the backward pass, and offers no way to
give that run what a context manager set around the first. Both runs are known to one
object of torch's: the frame of a checkpoint, or the context of the reentrant kind's autograd
function. They are read off the Python stack, since torch hands them to nobody.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType, GeneratorType
from typing import Any

import torch
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame

__all__ = ["checkpoints_around", "is_in_backward"]

_FILE = checkpoint.__file__


def is_in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def checkpoints_around() -> Iterator[Any]:
    """The checkpoints whose regions run now, the innermost first: objects that take attributes."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE and (known := _checkpoint_of(frame)) is not None:
            yield known
        frame = frame.f_back


def _checkpoint_of(frame: FrameType) -> Any:
    """The checkpoint that a frame of torch's module runs the region of, if it does."""
    if frame.f_code in _REENTRANT:
        return frame.f_locals["ctx"]
    for value in frame.f_locals.values():
        if isinstance(value, _CheckpointFrame):
            return value
        # Between its two steps, the generator that a first run is in is not on the stack.
        if isinstance(value, GeneratorType) and value.gi_frame is not None:
            for inner in value.gi_frame.f_locals.values():
                if isinstance(inner, _CheckpointFrame):
                    return inner
    return None


_REENTRANT = frozenset({CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__})
