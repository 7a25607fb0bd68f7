"""The values that a convention's fields may have."""

from __future__ import annotations

import math
import numbers
from typing import cast

from coordconv_patch.errors import CoordinatesError, excerpt

__all__ = [
    "center_of",
    "finite",
    "is_whole",
    "octaves_of",
    "period_of",
    "radius_center_of",
    "range_of",
    "refuse_subclass",
    "seed_of",
    "value_range_of",
]

_LARGEST_VALUE = 1e18
"""Coordinates of at most this size have squares that are finite in float32."""
_MOST_OCTAVES = 32
"""At 32 octaves float64 still tells sin(2^k pi u) to six digits; NeRF uses 10."""
_LARGEST_PERIOD = 1e6
_LARGEST_SEED = 2**31 - 1


def refuse_subclass(value: object, base: type) -> None:
    """Check that a value is of a class, and not of a subclass.

    Raises:
        CoordinatesError: If it is.
    """
    if type(value) is not base:
        raise CoordinatesError(
            f"{type(value).__name__} is a subclass of {base.__name__}, which is not supported: "
            f"files, programs and exports tell a convention by the fields of {base.__name__} "
            "alone, so it would come back as another one"
        )


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, numpy's included; ``True`` is not one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def value_range_of(value: object) -> tuple[float, float]:
    """A ``value_range`` as two floats.

    Raises:
        CoordinatesError: If it is not two finite numbers, the smaller first.
    """
    numbers_given = value if isinstance(value, (tuple, list)) and len(value) == 2 else (None, None)
    low, high = map(finite, numbers_given)
    if not low < high:
        raise CoordinatesError(
            f"value_range={excerpt(value)}: write two finite numbers, the smaller first, such as "
            f"(-1.0, 1.0); none beyond {_LARGEST_VALUE:g}"
        )
    return low, high


def range_of(value: object) -> tuple[float, float]:
    """A block's ``value_range`` as two floats.

    Raises:
        CoordinatesError: If it is not two different finite numbers.
    """
    numbers_given = value if isinstance(value, (tuple, list)) and len(value) == 2 else (None, None)
    first, last = map(finite, numbers_given)
    if not abs(last - first) > 0:
        raise CoordinatesError(
            f"value_range={excerpt(value)}: write two different finite numbers, such as "
            f"(-1.0, 1.0); none beyond {_LARGEST_VALUE:g}"
        )
    return first, last


def center_of(value: object, axes: str | None) -> float | tuple[float, ...]:
    """A radius' ``center`` as a float, or as one for each axis.

    Args:
        value: What was given.
        axes: The axes that the radius is measured along, ``None``: all.

    Raises:
        CoordinatesError: If it is not a finite number, or one for each axis.
    """
    if not isinstance(value, (tuple, list)):
        values: tuple[float, ...] = (finite(value),)
    else:
        values = tuple(map(finite, value))
    counts = range(1, 4) if axes is None else (len(axes),)
    is_tuple = isinstance(value, (tuple, list))
    if any(map(math.isnan, values)) or (is_tuple and len(values) not in counts):
        raise CoordinatesError(
            f"center={excerpt(value)}: write the finite coordinate from which r is measured, a "
            "tuple with one for each axis, or None for the middle; none beyond "
            f"{_LARGEST_VALUE:g}"
        )
    return values if is_tuple else values[0]


def octaves_of(name: str, value: object, *, least: int) -> int:
    """A number of octaves as an ``int``.

    Raises:
        CoordinatesError: If it is not a whole number from ``least`` to 32.
    """
    if not is_whole(value) or not least <= cast(int, value) <= _MOST_OCTAVES:
        raise CoordinatesError(
            f"{name}={excerpt(value)}: write a number of octaves, {least} or more and at "
            f"most {_MOST_OCTAVES}"
        )
    return int(cast(int, value))


def seed_of(value: object) -> int | None:
    """The seed of a permutation as an ``int``; ``None``: there is none.

    Raises:
        CoordinatesError: If it is not a whole number from 0 to 2^31 - 1.
    """
    if value is None:
        return None
    if not is_whole(value) or not 0 <= cast(int, value) <= _LARGEST_SEED:
        raise CoordinatesError(
            f"scrambled={excerpt(value)}: write the seed of a permutation of the places, a whole "
            f"number from 0 to {_LARGEST_SEED}, or None"
        )
    return int(cast(int, value))


def period_of(value: object) -> float:
    """A ``period`` as a float.

    Raises:
        CoordinatesError: If it is not a number above 0 that is neither tiny nor huge.
    """
    period = finite(value)
    if not 1 / _LARGEST_PERIOD <= period <= _LARGEST_PERIOD:
        raise CoordinatesError(
            f"period={excerpt(value)}: write the longest period as a multiple of the picture's "
            f"length, from {1 / _LARGEST_PERIOD:g} to {_LARGEST_PERIOD:g}, such as 1.0"
        )
    return period


def radius_center_of(value: object) -> float:
    """A ``radius_center`` as a float.

    Raises:
        CoordinatesError: If it is not a finite number.
    """
    center = finite(value)
    if math.isnan(center):
        raise CoordinatesError(
            f"radius_center={excerpt(value)}: write a finite number, the coordinate from which r "
            f"is measured, or None; none beyond {_LARGEST_VALUE:g}"
        )
    return center


def finite(value: object) -> float:
    """A real number as a float; NaN if it is none, or too large to be a coordinate."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if abs(number) <= _LARGEST_VALUE else math.nan
