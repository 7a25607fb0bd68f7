"""What the command ``rank`` works on: a model, batches and a loss, from a function in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from coordconv_patch.cli.sources import result_of_function
from coordconv_patch.errors import ModelSourceError

__all__ = ["RankedTask", "ranked_task"]


class RankedTask(NamedTuple):
    """The first three arguments of :func:`coordconv_patch.rank`."""

    model: nn.Module
    batches: Any
    loss_fn: Callable[[nn.Module, Any], Any]


def ranked_task(source: str) -> RankedTask:
    """What the function of ``path/to/file.py:FUNCTION`` returns.

    Raises:
        ModelSourceError: If it cannot be called, or returns something else.
    """
    if ".py:" not in source:
        raise ModelSourceError(
            f"{source!r}: write path/to/file.py:FUNCTION, whose function returns a model, batches "
            "and a loss function"
        )
    result = result_of_function(source)
    if not isinstance(result, tuple) or len(result) != 3:
        raise ModelSourceError(
            f"{source} returned a {type(result).__name__}; it must return three things: a model, "
            "batches and a loss function"
        )
    return RankedTask(*result)
