"""The weight of a concatenating CoordConv, taken apart: the image's part and the coordinates'."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["taken_apart"]


def taken_apart(
    weight: Tensor, image_channels: int, *, transposed: bool, is_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Views of the two parts.

    Args:
        weight: Shape ``(C_out, C + K, *kernel_size)``, if transposed ``(C + K, C_out, ...)``.
        image_channels: C.
        transposed: Whether it is that of a transposed convolution.
        is_first: Whether the coordinates' channels come before the image's.

    Returns:
        The image's C channels, and the K of the coordinates.
    """
    dim = 0 if transposed else 1
    count = weight.shape[dim] - image_channels
    if is_first:
        coordinates, image = torch.split(weight, [count, image_channels], dim)
    else:
        image, coordinates = torch.split(weight, [image_channels, count], dim)
    return image, coordinates
