"""The values that a convention's fields may have."""

from __future__ import annotations

import math
import numbers

from coordconv_patch.errors import CoordinatesError, excerpt

__all__ = ["finite", "is_whole", "radius_center_of", "refuse_subclass", "value_range_of"]

_LARGEST_VALUE = 1e18
"""Coordinates of at most this size have squares that are finite in float32."""


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
