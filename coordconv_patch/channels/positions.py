"""Where pixels lie in the whole picture: what the values of every coordinate channel are made from.

With i the index of a pixel in the whole picture of n pixels, its position u along an axis is::

    endpoints    u = (2i - (n - 1)) / (n - 1)   -1 and 1 at the outer pixel centres
    edges        u = (2i + 1 - n) / n           -1 and 1 at the outer pixel edges
    left edges   u = (2i - n) / n               i / n, brought to -1 and 1: -1 at the first pixel
                                                centre, 1 one pixel beyond the last

On an axis of one pixel "endpoints" and "edges" give 0; published forms that divide by ``n - 1``
give NaN there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["AXIS_NAMES", "CENTRINGS", "AxisPixels", "axis_position", "dim_of"]

AXIS_NAMES = ("x", "y", "z")
"""Axis names, counted from the last dimension: x along W, y along H, z along D."""

CENTRINGS = ("endpoints", "edges", "left edges", "swapped endpoints")
"""What may be asked of :func:`axis_position`. "swapped endpoints" is a known bug of the paper's
released code: x is divided by H - 1 and y by W - 1. It is kept so that its weights can be imported.
"""


class AxisPixels(NamedTuple):
    """Pixels along one axis, in the pixels of the whole picture.

    The *positions* that a :class:`~coordconv_patch.ChannelBlock` gets are a tuple of these, one
    for each spatial dimension, in the order of the dimensions: (z, y, x), (y, x) or (x,).

    Attributes:
        index: Indices of the pixels, floats. They may be fractions and lie beyond the picture.
            Their shape may be any that broadcasts with that of the other axes: ``(H, 1)`` and
            ``(1, W)`` for a grid, ``(N, H, W)`` where each sample has its own.
        length: Number of pixels of the whole picture along the axis, at the resolution of the
            layer; a fraction too, and a tensor that broadcasts with ``index``, such as
            ``(N, 1, 1)``. Symbolic where a graph is captured.
    """

    index: Tensor  # type: ignore[assignment]  # which hides tuple.index
    length: int | float | torch.SymInt | Tensor


def dim_of(axis: str, ndim: int) -> int:
    """The spatial dimension, of ``ndim``, that an axis runs along."""
    return ndim - 1 - AXIS_NAMES.index(axis)


def axis_position(positions: Sequence[AxisPixels], dim: int, centring: str) -> Tensor:
    """The position u of pixels along one axis, -1 to 1 in the picture.

    Args:
        positions: The pixels along each axis.
        dim: The axis, as a spatial dimension.
        centring: One of :data:`CENTRINGS`.

    Returns:
        Positions in the shape of the axis' index, which that of its length broadcasts with.
    """
    index: Tensor = positions[dim].index
    length: Any = positions[dim].length
    if centring == "edges":
        return (2 * index + 1 - length) / length
    if centring == "left edges":
        return (2 * index - length) / length
    if centring == "swapped endpoints" and len(positions) > 1:
        # The released code swaps the divisors of the two image axes.
        other = {len(positions) - 1: -2, len(positions) - 2: -1}.get(dim, dim)
        last: Any = positions[other].length - 1
        return (2 * index - last) / _at_least_one(last)
    return _between_endpoints(index, length - 1)


def _between_endpoints(index: Tensor, last: Any) -> Tensor:
    """u, where the last pixel's index is given; 0 where that is 0 or below."""
    if isinstance(last, Tensor) and last.is_floating_point():
        return torch.where(last > 0, (2 * index - last) / _at_least_one(last), 0.0)
    if isinstance(last, (int, float)) and last <= 0:
        return torch.zeros_like(index)
    return (2 * index - last) / _at_least_one(last)


def _at_least_one(last: Any) -> Any:
    """The divisor n - 1, or 1 where that is 0 or below, for numbers and symbols alike."""
    if isinstance(last, Tensor):
        if last.is_floating_point():
            return torch.where(last > 0, last, 1.0)
        return last.clamp(min=1)
    if isinstance(last, (int, float)):
        return last if last > 0 else 1
    # Captured sizes are 2 or more, so that no symbol is a fraction between 0 and 1.
    return torch.sym_max(last, 1)
