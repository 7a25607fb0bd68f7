"""Where pixels lie along an axis: the u from -1 to 1 that every coordinate is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coordconv_patch.layers.window import Window

__all__ = ["axis_positions"]


def axis_positions(
    index: Tensor,
    dim: int,
    size: Sequence[int | torch.SymInt | Tensor],
    window: Window | None,
    *,
    align_corners: bool,
    swap_sizes: bool,
) -> Tensor:
    """The position u of pixels along one axis, see :class:`coordconv_patch.Coordinates`.

    Args:
        index: The pixels, any shape, beyond the input too.
        dim: The axis, as a spatial dimension.
        size: Spatial size of the input, in pixels; may be symbolic.
        window: Where in a larger image the input lies.
        align_corners: As in :class:`coordconv_patch.Coordinates`; so for the argument after it.
        swap_sizes: See ``align_corners``.

    Returns:
        Positions in the shape of ``index``.
    """
    length: Any = size[dim]
    if window is None:
        full: Any = length
    else:
        full = length * window.image_size[dim] / window.size[dim]
        index = index + length * window.offset[dim] / window.size[dim]
    if not align_corners:
        return (2 * index + 1 - full) / full
    if swap_sizes and len(size) > 1:
        # The released code swaps the divisors of the two image axes.
        full = size[{len(size) - 1: -2, len(size) - 2: -1}.get(dim, dim)]
    last = full - 1
    return (2 * index - last) / _at_least_one(last)


def _at_least_one(last: Any) -> Any:
    """The divisor n - 1, or 1 on an axis of one pixel, for numbers and symbols alike."""
    if isinstance(last, Tensor):
        return last.clamp(min=1)
    if isinstance(last, (int, float)):
        return last if last > 0 else 1
    return torch.sym_max(last, 1)
