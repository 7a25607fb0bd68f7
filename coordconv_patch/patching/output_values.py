"""The values in a model's output, and in which way one differs from another."""

from __future__ import annotations

import array
from collections.abc import Iterator, Set
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coordconv_patch.running.held_values import held_by
from coordconv_patch.running.tensor_values import plain_parts, same_values

__all__ = ["MISSING", "Uncompared", "difference_of", "values_in"]


class Uncompared:
    """In place of a value that cannot be compared.

    Args:
        value: The value.

    Attributes:
        kind: The class of the value.
    """

    def __init__(self, value: Any) -> None:
        self.kind = type(value).__name__


MISSING = object()
"""In place of a value that one of two outputs lacks."""


def values_in(output: Any) -> Iterator[tuple[str, Any]]:
    """The values of an output, each with its place: of containers and of objects' attributes.

    They are tensors, NumPy arrays and plain values, copied where the model may write into them;
    and an :class:`Uncompared` for each value that is none of these and cannot be looked into.
    """
    return _Walk().through(output, "", 0)


class _Walk:
    """A walk through an output, which looks into each container and object once."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def through(self, value: Any, place: str, depth: int) -> Iterator[tuple[str, Any]]:
        """The values in a value that lies at a place, so many attributes and containers deep."""
        if isinstance(value, _PLAIN):
            yield place, value
        elif isinstance(value, Tensor):
            yield from _of_tensor(value, place)
        elif hasattr(type(value), "__array__") or hasattr(type(value), "__array_interface__"):
            yield from self._through_array(value, place, depth)
        elif isinstance(value, _BUFFERS):
            yield place, memoryview(value).tobytes()
        elif isinstance(value, Set):
            yield place, _of_set(value)
        elif id(value) not in self._seen:
            self._seen[id(value)] = value  # held, so that no other object gets its id
            yield from self._through_parts(value, place, depth)

    def _through_parts(self, value: Any, place: str, depth: int) -> Iterator[tuple[str, Any]]:
        parts = list(held_by(value)) if depth < _MAX_DEPTH else []
        for suffix, each in parts:
            yield from self.through(each, place + suffix, depth + 1)
        if not parts and _hashes_by_value(value):
            yield place, value
        elif not parts and _may_hold(value, depth):
            yield place, Uncompared(value)

    def _through_array(self, value: Any, place: str, depth: int) -> Iterator[tuple[str, Any]]:
        """NumPy's arrays and scalars, and what gives one: pictures, tables, other arrays."""
        try:
            values = np.array(value)
        except Exception:  # whatever a library raises, about memory of an accelerator perhaps
            yield place, Uncompared(value)
            return
        if values.dtype.hasobject:
            yield from self.through(values.tolist(), place, depth)
        else:
            yield place, values


_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, Enum, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Values that are compared as they are."""

_BUFFERS = (bytearray, memoryview, array.array)

_MAX_DEPTH = 32
"""Of containers and attributes in each other: outputs that refer to half the program end there."""


def _hashes_by_value(value: Any) -> bool:
    """Whether a value is compared by what it is, as dates and decimal numbers are."""
    own: Any = type(value).__hash__
    return own is not None and own is not object.__hash__


def _may_hold(value: Any, depth: int) -> bool:
    """Whether a value in which nothing is seen may hold something."""
    if depth >= _MAX_DEPTH:
        return True
    if isinstance(value, (list, tuple, dict, nn.Module)) or callable(value):
        return False
    if hasattr(value, "__len__"):  # an empty container, unless it is of an unknown kind
        return len(value) > 0
    # An object of Python's own making has a dict for its attributes, which is empty.
    return not hasattr(value, "__dict__") and type(value) is not object


def _of_tensor(tensor: Tensor, place: str) -> Iterator[tuple[str, Any]]:
    try:
        parts = [(f"{place}{name}", part.detach().clone()) for name, part in plain_parts(tensor)]
    except (NotImplementedError, RuntimeError, TypeError):  # of a layout that torch lacks this for
        yield place, Uncompared(tensor)
        return
    if len(parts) != 1 or parts[0][0] != place:
        yield place, _shown(tensor)
    yield from parts


def _of_set(values: Set[Any]) -> Any:
    """What a set holds, in an order that is the same each time."""
    if all(isinstance(each, _PLAIN) for each in values):
        return sorted((type(each).__name__, repr(each)) for each in values)
    return Uncompared(values)


def difference_of(before: Any, after: Any) -> str:
    """In which way a value differs; empty if it does not, or if it cannot be compared."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return _difference_of_tensors(before, after)
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        return _difference_of_arrays(before, after)
    if isinstance(before, Uncompared) and isinstance(after, Uncompared):
        return "" if before.kind == after.kind else f"a {before.kind} before, a {after.kind} after"
    same = type(before) is type(after) and (before == after or _bits(before) == _bits(after))
    return "" if same else f"{_shown(before)} before, {_shown(after)} after"


def _bits(value: Any) -> Any:
    """A number that may not be a number, in a form that can be compared."""
    return repr(value) if isinstance(value, (float, complex)) else value


def _difference_of_tensors(before: Tensor, after: Tensor) -> str:
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return f"{_shown(before)} before, {_shown(after)} after"
    if before.is_meta or same_values(before, after):
        return ""
    if not (before.is_floating_point() or before.is_complex()):
        return f"{int((before != after).sum())} of {before.numel()} values differ"
    wide = torch.complex128 if before.is_complex() else torch.float64
    return _by_how_much((before.cpu().to(wide) - after.cpu().to(wide)).abs().numpy())


def _difference_of_arrays(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> str:
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return f"{_shown(before)} before, {_shown(after)} after"
    kind = before.dtype.kind
    if kind == "V":  # of records, whose numbers may not be numbers
        return "" if before.tobytes() == after.tobytes() else "it differs"
    if np.array_equal(before, after, equal_nan=kind in "fcmM"):
        return ""
    if kind in "fc":
        with np.errstate(all="ignore"):  # infinities have no distance
            return _by_how_much(np.abs(before - after))
    return f"{np.count_nonzero(before != after)} of {before.size} values differ"


def _by_how_much(distances: np.ndarray[Any, Any]) -> str:
    """How far values lie apart that are not the same."""
    finite = distances[np.isfinite(distances)]
    largest = float(finite.max()) if finite.size else 0.0
    return f"it differs by up to {largest:.3g}" if largest else "it is finite at other places"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f", {value.layout}"
        shape = "" if value.is_nested else f" of shape {tuple(value.shape)}"
        return f"a {'nested ' if value.is_nested else ''}tensor{shape}, {value.dtype}{layout}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}, {value.dtype}"
    return "nothing" if value is MISSING else repr(value)[:60]
