"""Coordinate channels written anew, pixel by pixel: what channel blocks must equal.

Nothing here imports the package. A picture is told by the index of its first pixel in the whole
picture and the whole picture's size, both in pixels of the layer's input, along each dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Pixel = tuple[float, ...]
"""Index in the whole picture, along each dimension."""
Size = tuple[float, ...]
"""Pixels of the whole picture along each dimension."""
Channel = Callable[[Pixel, Size], float]


def grid(
    channels: Sequence[Channel],
    size: Sequence[int],
    first: Sequence[float] | None = None,
    whole: Sequence[float] | None = None,
) -> np.ndarray:
    """Channels ``(K, *size)`` in float64; the picture is a whole one if nothing else is told."""
    first = [0.0] * len(size) if first is None else first
    whole = tuple(size) if whole is None else tuple(whole)
    values = np.empty((len(channels), *size))
    for pixel in np.ndindex(*size):
        index = tuple(start + own for start, own in zip(first, pixel, strict=True))
        for number, channel in enumerate(channels):
            values[(number, *pixel)] = channel(index, whole)
    return values


def along(axis: str, pixel: Pixel, whole: Size) -> tuple[float, float]:
    """Index and length along an axis: x is the last dimension."""
    dim = len(whole) - 1 - "xyz".index(axis)
    return pixel[dim], whole[dim]


def fraction(axis: str, centring: str, pixel: Pixel, whole: Size) -> float:
    """How far along the picture a pixel lies, 0 to 1."""
    index, length = along(axis, pixel, whole)
    if centring == "endpoints":
        return index / (length - 1) if length > 1 else 0.5
    if centring == "edges":
        return (index + 0.5) / length
    assert centring == "left edges"
    return index / length


def coordinate(
    axis: str, centring: str = "endpoints", value_range: tuple[float, float] = (-1.0, 1.0)
) -> Channel:
    """The coordinate along an axis, by linear interpolation between the two ends."""

    def channel(pixel: Pixel, whole: Size) -> float:
        if centring == "pixels":
            return along(axis, pixel, whole)[0]
        first, last = value_range
        share = fraction(axis, centring, pixel, whole)
        return first * (1 - share) + last * share

    return channel


def distance(
    axes: str,
    center: Sequence[float],
    *,
    normalized: bool = False,
    centring: str = "endpoints",
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Channel:
    """The distance from a point; of the largest over all pixels, a search over the corners."""
    coordinates = [coordinate(axis, centring, value_range) for axis in axes]

    def plain(pixel: Pixel, whole: Size) -> float:
        return math.dist([each(pixel, whole) for each in coordinates], center)

    def channel(pixel: Pixel, whole: Size) -> float:
        if not normalized:
            return plain(pixel, whole)
        corners = itertools.product(*((0.0, max(length - 1, 0.0)) for length in whole))
        largest = max(plain(corner, whole) for corner in corners)
        return plain(pixel, whole) / largest if largest else plain(pixel, whole)

    return channel


def wave(
    function: Callable[[float], float], axis: str, waves: float, centring: str = "endpoints"
) -> Channel:
    """A sine or cosine of ``waves`` waves along the picture, whose middle has the phase 0."""

    def channel(pixel: Pixel, whole: Size) -> float:
        share = fraction(axis, centring, pixel, whole)
        return function(2 * math.pi * waves * (share - 0.5))

    return channel
