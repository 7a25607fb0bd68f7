"""Where the pixels of an input lie in the whole picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from coordconv_patch.channels.positions import AxisPixels
from coordconv_patch.layers.window import Window

__all__ = ["pixel_positions"]


def pixel_positions(
    size: Sequence[int | torch.SymInt | Tensor],
    window: Window | None,
    device: torch.device,
    dtype: torch.dtype,
    indices: Sequence[Tensor] | None = None,
) -> tuple[AxisPixels, ...]:
    """The positions that channels are computed from, see :class:`coordconv_patch.AxisPixels`.

    Args:
        size: Spatial size of the input, in pixels; may be symbolic.
        window: Where in a larger picture the input lies; ``None``: it is the whole picture.
        device: Device of the indices.
        dtype: Their dtype.
        indices: For each dimension the pixels of the input to tell of, any shape, beyond it too;
            ``None``: all, of shapes that broadcast to ``size``.
    """
    if indices is None:
        lengths = cast("tuple[int, ...]", size)
        indices = [
            _along(torch.arange(length, device=device, dtype=dtype), dim, len(size))
            for dim, length in enumerate(lengths)
        ]
    return tuple(
        _in_picture(index.to(device, dtype), dim, size[dim], window)
        for dim, index in enumerate(indices)
    )


def _in_picture(index: Tensor, dim: int, length: Any, window: Window | None) -> AxisPixels:
    if window is None:
        return AxisPixels(index, length)
    whole = length * window.image_size[dim] / window.size[dim]
    return AxisPixels(index + length * window.offset[dim] / window.size[dim], whole)


def _along(line: Tensor, dim: int, ndim: int) -> Tensor:
    """A line as a tensor of ``ndim`` dimensions that all but one have length 1."""
    return line.reshape([-1 if at == dim else 1 for at in range(ndim)])
