"""The values in a model's output, and in which way one differs from another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MISSING", "difference_of", "values_in"]


def values_in(output: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of an output: of containers, and of objects' attributes."""
    if isinstance(output, Tensor):
        yield place, output.detach().clone()
    elif output is None or isinstance(output, (bool, int, float, str)):
        yield place, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from values_in(value, f"{place}[{key!r}]", depth + 1)
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from values_in(value, f"{place}[{index}]", depth + 1)
    elif hasattr(output, "__dict__") and not isinstance(output, nn.Module) and depth < _MAX_DEPTH:
        for name, value in vars(output).items():
            yield from values_in(value, f"{place}.{name}", depth + 1)


_MAX_DEPTH = 8
"""Of attributes of objects, which may refer to each other in a circle."""


MISSING = object()
"""In place of a value that one of two outputs lacks."""


def difference_of(before: Any, after: Any) -> str:
    """In which way a value differs; empty if it does not."""
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        same = type(before) is type(after) and (before == after or before != before)
        return "" if same else f"{_shown(before)} before, {_shown(after)} after"
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return f"{_shown(before)} before, {_shown(after)} after"
    if before.is_meta or torch.equal(before, after):
        return ""
    if not before.is_floating_point():
        return f"{int((before != after).sum())} of {before.numel()} values differ"
    if torch.equal(before.nan_to_num(), after.nan_to_num()):
        return ""
    largest = (before.double() - after.double()).abs().nan_to_num().max()
    return f"it differs by up to {float(largest):.3g}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return "nothing" if value is MISSING else repr(value)[:60]
