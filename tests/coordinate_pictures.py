"""Pictures whose values are their own coordinates, so that a result shows where it came from."""

from __future__ import annotations

import torch
from torch import Tensor


def coordinate_picture(height: int, width: int) -> Tensor:
    """Channels x / W and y / H at the centres of pixels, and ones; shape (3, H, W), float32."""
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    y = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).float()


def check_place(shown: Tensor, theta: Tensor, whole: tuple[int, int], limit: float = 0.1) -> None:
    """Compare what a place says with what a transformed coordinate picture shows.

    Within a pixel of the borders resampling mixes in what is outside, or repeats the border.

    Args:
        shown: The transformed picture, shape (3, h, w).
        theta: Its place, shape (2, 3).
        whole: Size of the picture before, (H, W).
        limit: Largest difference, in pixels of the coarser of both; the mean may have a tenth.
    """
    assert theta.shape == (2, 3)
    assert theta.dtype == torch.float32
    rows, columns = shown.shape[-2:]
    height, width = whole
    lengths = torch.tensor([width, height], dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    inputs = torch.stack([(2 * x + 1) / columns - 1, (2 * y + 1) / rows - 1, torch.ones_like(x)])
    said = (torch.einsum("kj,jhw->hwk", theta.double(), inputs.double()) + 1) / 2 * lengths
    seen = shown[:2].permute(1, 2, 0).double() * lengths
    step = theta[:, :2].double() * lengths[:, None] / torch.tensor([columns, rows])
    pixel = max(1.0, float(step.square().sum(1).sqrt().max()))
    is_inside = (shown[2] - 1).abs() < 1e-3
    lowest, highest = (of(seen[is_inside], dim=0).values for of in (torch.min, torch.max))
    margin = 1.5 * pixel
    is_inside &= ((seen > lowest + margin) & (seen < highest - margin)).all(-1)
    assert int(is_inside.sum()) >= 20
    difference = (seen - said)[is_inside] / pixel
    assert float(difference.abs().max()) < limit
    assert float(difference.mean(0).abs().max()) < limit / 10
