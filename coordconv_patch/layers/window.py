"""Where in a larger image an input lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordconv_patch.channels.convention_fields import is_whole, refuse_subclass
from coordconv_patch.errors import CoordinatesError, excerpt

__all__ = ["Window", "window_from_fields"]

_LARGEST_PIXEL = 2**31 - 1
"""Windows lie in images of at most so many pixels along an axis."""


@dataclass(frozen=True)
class Window:
    """A rectangle of a larger image, in pixels of that image.

    A tile or crop that is given its window sees the coordinates of the whole
    image. All three fields are in the order of a tensor's spatial dimensions:
    ``(H, W)`` for images, ``(L,)`` for signals, ``(D, H, W)`` for volumes.

    Inside a network, a feature map of ``h'`` rows stands for the same part of
    the image, so its full-image counterpart has ``h' * image_size / size`` rows.

    Args:
        offset: First pixel of the window, ``(top, left)``, whole numbers, each ``>= 0``.
        size: Extent of the window, ``(height, width)``, each ``>= 1``.
        image_size: Extent of the whole image, ``(height, width)``, each below ``2**31``.

    Raises:
        CoordinatesError: If the numbers are not whole ones, or the window does not lie
            inside the image.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]
    image_size: tuple[int, ...]

    def __post_init__(self) -> None:
        refuse_subclass(self, Window)
        for field in ("offset", "size", "image_size"):
            object.__setattr__(self, field, _pixels(field, getattr(self, field)))
        if not len(self.offset) == len(self.size) == len(self.image_size):
            raise CoordinatesError(
                f"{self}: offset, size and image_size must have one number per spatial "
                "dimension each, such as offset=(top, left), size=(h, w), image_size=(H, W)"
            )
        for offset, size, image in zip(self.offset, self.size, self.image_size, strict=True):
            if offset < 0 or size < 1 or offset + size > image:
                raise CoordinatesError(
                    f"{self} does not lie inside its image: need 0 <= offset, 1 <= size and "
                    "offset + size <= image_size in every dimension"
                )


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


def _pixels(field: str, values: object) -> tuple[int, ...]:
    """One of a window's fields; numpy's integers become Python's."""
    if (
        not isinstance(values, (tuple, list))
        or not 1 <= len(values) <= 3
        or not all(is_whole(value) and abs(value) <= _LARGEST_PIXEL for value in values)
    ):
        raise CoordinatesError(
            f"window: {field}={excerpt(values)}: write a tuple of one to three whole numbers "
            f"below 2**31, one per spatial dimension, such as {field}=(224, 224)"
        )
    return tuple(int(value) for value in values)
