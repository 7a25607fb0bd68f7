"""Which part of a padded batch each picture is: from sizes, and from masks.

A picture of h x w pixels whose first pixel lies at (left, top) of a canvas of H x W pixels: the
position x of the canvas, -1 and 1 at its edges, is ``X = (x + 1) W / 2`` pixels from its left edge,
and ``2 (X - left) / w - 1`` in the picture. So theta is::

    [[W / w, 0, (W - 2 left) / w - 1],
     [0, H / h, (H - 2 top) / h - 1]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["place_in_canvas", "places_by_masks", "places_by_sizes", "wide_dtype"]


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: its few numbers cost nothing."""
    return torch.float32 if device.type == "mps" else torch.float64


def place_in_canvas(canvas: Sequence[int], size: Tensor, offset: Tensor) -> Tensor:
    """The places of pictures in a canvas.

    Args:
        canvas: Its height and width in pixels.
        size: Heights and widths of the pictures, shape (N, 2), of floats.
        offset: Top and left of them, shape (N, 2).

    Returns:
        Shape (N, 2, 3), from the canvas to the pictures.
    """
    extent = torch.tensor(list(canvas), dtype=size.dtype, device=size.device)
    scale = (extent / size).flip(1)
    shift = ((extent - 2 * offset) / size - 1).flip(1)
    return torch.cat((torch.diag_embed(scale), shift.unsqueeze(-1)), dim=-1)


def places_by_sizes(
    canvas: Sequence[int], sizes: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """Of pictures that lie at the top left of their canvas, by heights and widths in pixels."""
    size = torch.tensor([list(each) for each in sizes], dtype=wide_dtype(device))
    return place_in_canvas(canvas, size, torch.zeros_like(size)).to(device)


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
    return place_in_canvas(masks.shape[1:], size, offset)
