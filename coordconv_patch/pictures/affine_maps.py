"""Affine maps between two pictures in pixels, and as a place.

Positions in pixels are measured from the upper left corner of a picture, in the order x, y: pixel
(row i, column j) covers x from j to j + 1, and its centre is at (j + 0.5, i + 0.5).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coordconv_patch.errors import CoordinatesError

__all__ = ["Array", "affine_fit", "theta_of_pixels"]

Array: TypeAlias = npt.NDArray[np.float64]


def affine_fit(points: Array, images: Array) -> tuple[Array, float]:
    """The affine map that takes points to their images, by least squares.

    Args:
        points: Shape (M, 2).
        images: Shape (M, 2).

    Returns:
        The map, shape (3, 3), for columns (x, y, 1); and the largest distance of a mapped point
        from its image.

    Raises:
        CoordinatesError: If the points are fewer than three or on one line.
    """
    columns = np.column_stack([points, np.ones(len(points))])
    solution, _, rank, _ = np.linalg.lstsq(columns, images, rcond=1e-9)
    if rank < 3:
        raise CoordinatesError("the points of an affine map are fewer than three or on one line")
    distances = np.linalg.norm(columns @ solution - images, axis=1)
    return np.vstack([solution.T, [0.0, 0.0, 1.0]]), float(distances.max())


def theta_of_pixels(matrix: Array, size: tuple[int, int], whole: tuple[int, int]) -> Tensor:
    """A map in pixels as a place, see :func:`coordconv_patch.places`.

    Args:
        matrix: Shape (3, 3), from positions in the network's input to positions in the whole
            picture, in pixels.
        size: Of the network's input, (H, W).
        whole: Of the whole picture, (H, W).

    Returns:
        Shape (2, 3), float32.
    """
    height, width = size
    to_pixels = np.array([[width / 2, 0, width / 2], [0, height / 2, height / 2], [0, 0, 1]])
    from_pixels = np.array([[2 / whole[1], 0, -1], [0, 2 / whole[0], -1]])
    theta = from_pixels @ matrix @ to_pixels
    # Far below a pixel, and far below float32 too; a flip then has zeros and ones.
    return torch.from_numpy(theta.round(10) + 0.0).float()
