"""Where in a larger image an input lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coordconv_patch.channels.convention_fields import finite, refuse_subclass
from coordconv_patch.errors import CoordinatesError, excerpt

__all__ = ["Window", "window_from_fields"]

_LARGEST_PIXEL = 2**31 - 1
"""Windows lie in images of at most so many pixels along an axis."""


@dataclass(frozen=True)
class Window:
    """A rectangle of a larger image, in pixels of that image.

    A tile or crop that is given its window sees the coordinates of the whole
    image. All three fields are in the order of a tensor's spatial dimensions:
    ``(H, W)`` for images, ``(L,)`` for signals, ``(D, H, W)`` for volumes. They may be
    fractions of pixels, and the rectangle may reach beyond the image, where a crop was padded.

    Inside a network, a feature map of ``h'`` rows stands for the same part of
    the image, so its full-image counterpart has ``h' * image_size / size`` rows.

    Args:
        offset: Where the window begins, ``(top, left)``; negative above and left of the image.
        size: Extent of the window, ``(height, width)``, each above 0.
        image_size: Extent of the whole image, ``(height, width)``, each above 0.

    Raises:
        CoordinatesError: If they are not finite numbers below ``2**31``, one per spatial
            dimension, or an extent is not above 0.
    """

    offset: tuple[float, ...]
    size: tuple[float, ...]
    image_size: tuple[float, ...]

    def __post_init__(self) -> None:
        refuse_subclass(self, Window)
        for field in ("offset", "size", "image_size"):
            object.__setattr__(self, field, _pixels(field, getattr(self, field)))
        if not len(self.offset) == len(self.size) == len(self.image_size):
            raise CoordinatesError(
                f"{self}: offset, size and image_size must have one number per spatial "
                "dimension each, such as offset=(top, left), size=(h, w), image_size=(H, W)"
            )
        if min(self.size) <= 0 or min(self.image_size) <= 0:
            raise CoordinatesError(f"{self}: size and image_size must be above 0 pixels")

    def theta(self) -> Tensor:
        """The window as a place, see :func:`coordconv_patch.places`.

        Returns:
            Shape (d, d + 1) for d dimensions, float64, rows and columns in the order x, y, z.
        """
        pairs = list(zip(self.offset, self.size, self.image_size, strict=True))[::-1]
        theta = torch.zeros(len(pairs), len(pairs) + 1, dtype=torch.float64)
        for axis, (offset, size, image) in enumerate(pairs):
            theta[axis, axis] = size / image
            theta[axis, -1] = (2 * offset + size) / image - 1
        return theta


def window_from_fields(fields: object) -> Window:
    """A window from parsed JSON, which may hold anything.

    Raises:
        CoordinatesError: If a field is missing or unknown, or :class:`Window` refuses its value.
    """
    names = ("offset", "size", "image_size")
    given: Mapping[Any, Any] = fields if isinstance(fields, Mapping) else {}
    missing = [name for name in names if name not in given]
    if missing or len(given) > len(names):
        what = f"missing {missing[0]}" if missing else f"it has more fields than {names}"
        raise CoordinatesError(f"window: {excerpt(fields)}: {what}")
    return Window(**given)


def _pixels(field: str, values: object) -> tuple[float, ...]:
    """One of a window's fields; numpy's numbers become Python's."""
    numbers = (
        tuple(map(finite, values))
        if isinstance(values, (tuple, list)) and 1 <= len(values) <= 3
        else (math.nan,)
    )
    if not all(abs(number) <= _LARGEST_PIXEL for number in numbers):  # NaN neither
        raise CoordinatesError(
            f"window: {field}={excerpt(values)}: write a tuple of one to three numbers of "
            f"pixels below 2**31, one per spatial dimension, such as {field}=(224, 224)"
        )
    return tuple(int(number) if number.is_integer() else number for number in numbers)
