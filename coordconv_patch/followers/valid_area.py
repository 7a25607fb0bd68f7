"""Which part of a padded batch each picture is: from sizes, and from masks.

A picture of h x w pixels whose first pixel lies at (left, top) of a canvas of H x W pixels: the
position x of the canvas, -1 and 1 at its edges, is ``X = (x + 1) W / 2`` pixels from its left edge,
and ``2 (X - left) / w - 1`` in the picture. So theta is::

    [[W / w, 0, (W - 2 left) / w - 1],
     [0, H / h, (H - 2 top) / h - 1]]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from coordconv_patch.layers.capture import is_capturing

__all__ = ["numbers", "place_of", "places_by_masks", "places_by_sizes", "wide_dtype"]


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where it is to be had: the few numbers of a place cost nothing."""
    return torch.float32 if device.type == "mps" or is_capturing() else torch.float64


def numbers(values: Iterable[Any], device: torch.device) -> Tensor:
    """Numbers of pixels as a tensor (n,); a trace gives them as tensors, and follows them."""
    wide, values = wide_dtype(device), list(values)
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value).to(device, wide) for value in values])
    return torch.tensor(values, dtype=wide).to(device)


def place_of(scale: Tensor, shift: Tensor) -> Tensor:
    """Places by what they scale and shift along x and y, both of shape (N, 2): (N, 2, 3)."""
    linear = scale.unsqueeze(-1) * torch.eye(2, dtype=scale.dtype, device=scale.device)
    return torch.cat((linear, shift.unsqueeze(-1)), dim=-1)


def _places_in_canvas(canvas: Sequence[Any], size: Tensor, offset: Tensor) -> Tensor:
    """The places of pictures in a canvas.

    Args:
        canvas: Its height and width in pixels.
        size: Heights and widths of the pictures, shape (N, 2), of floats.
        offset: Top and left of them, shape (N, 2).

    Returns:
        Shape (N, 2, 3), from the canvas to the pictures.
    """
    extent = numbers(canvas, size.device)
    return place_of((extent / size).flip(1), ((extent - 2 * offset) / size - 1).flip(1))


def places_by_sizes(
    canvas: Sequence[Any], sizes: Sequence[Sequence[Any]], device: torch.device
) -> Tensor:
    """Of pictures that lie at the top left of their canvas, by heights and widths in pixels."""
    size = torch.stack([numbers(each, device) for each in sizes])
    return _places_in_canvas(canvas, size, torch.zeros_like(size))


def places_by_masks(masks: Tensor) -> Tensor:
    """Of pictures where their masks are not zero: the smallest rectangle around that.

    Args:
        masks: Shape (N, H, W); a mask that is zero everywhere counts as a whole one.

    Returns:
        Shape (N, 2, 3).
    """
    valid = masks != 0
    firsts, sizes = [], []
    for dim in (2, 1):  # rows: any along the columns, and the other way round
        line = valid.any(dim).to(torch.uint8)
        first, last = line.argmax(1), line.shape[1] - 1 - line.flip(1).argmax(1)
        firsts.append(first)
        sizes.append(last + 1 - first)
    wide = wide_dtype(masks.device)
    size, offset = torch.stack(sizes, 1).to(wide), torch.stack(firsts, 1).to(wide)
    return _places_in_canvas(masks.shape[1:], size, offset)
