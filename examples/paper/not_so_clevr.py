"""Not-so-Clevr: a square at every position of a canvas, in two splits; and how to score.

A canvas of 64 x 64 pixels holds one square of 9 x 9 pixels. Its centre (x, y), x along W
and y along H, takes every position at which the square lies inside with a pixel to spare:
4 to 59 on both axes, 3,136 in all (Liu et al. 2018, https://arxiv.org/abs/1807.03247).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CANVAS = 64
"""Height and width of the canvas, in pixels."""
RADIUS = 4
"""A square reaches this many pixels from its centre, so it is 9 x 9."""
LAST = CANVAS - RADIUS - 1
"""The largest coordinate of a centre; the smallest is RADIUS."""


@dataclass(frozen=True)
class Split:
    """Centres to train on and centres to test on.

    Attributes:
        train: Integer pixels (x, y), shape ``(N, 2)``.
        test: Likewise; no centre is in both.
    """

    train: Tensor
    test: Tensor


def all_centers() -> Tensor:
    """Every position of a square's centre: integer pixels (x, y), shape ``(3136, 2)``."""
    axis = torch.arange(RADIUS, LAST + 1)
    return torch.cartesian_prod(axis, axis)


def uniform_split() -> Split:
    """A random quarter is the test set: 2,368 and 768 centres.

    Numbers, generator and threshold are those of the released code (the post says 80/20).
    """
    centers = all_centers()
    trains = torch.from_numpy(np.random.RandomState(20202).rand(len(centers)) > 0.25)
    return Split(centers[trains], centers[~trains])


def quadrant_split() -> Split:
    """The lower right quadrant is the test set: 2,407 and 729 centres."""
    centers = all_centers()
    tests = (centers > CANVAS // 2).all(1)
    return Split(centers[~tests], centers[tests])


SPLITS: dict[str, Callable[[], Split]] = {"uniform": uniform_split, "quadrant": quadrant_split}
"""The two splits by name."""


def scaled(centers: Tensor) -> Tensor:
    """Pixels (x, y), shape ``(N, 2)``, from -1 at the first pixel to 1 at the last."""
    return centers * (2 / (CANVAS - 1)) - 1


def pixel_index(centers: Tensor) -> Tensor:
    """Number of a centre's pixel in a flattened canvas, row by row; ``(N, 2)`` to ``(N,)``."""
    return centers[:, 1] * CANVAS + centers[:, 0]


def one_hot(centers: Tensor) -> Tensor:
    """Canvases with 1.0 at the centre's pixel and 0 elsewhere, shape ``(N, 1, 64, 64)``."""
    pixels = torch.zeros(len(centers), CANVAS * CANVAS)
    pixels[torch.arange(len(centers)), pixel_index(centers)] = 1.0
    return pixels.view(-1, 1, CANVAS, CANVAS)


def squares(centers: Tensor) -> Tensor:
    """Canvases with 1.0 on the square and 0 elsewhere, shape ``(N, 1, 64, 64)``.

    The released code draws squares in grey 128 of 255, and no rounded image can match those.
    """
    near = (torch.arange(CANVAS) - centers[..., None]).abs() <= RADIUS  # (N, 2, 64): x, y
    return (near[:, 1, :, None] & near[:, 0, None, :]).float()[:, None]


def accuracy(logits: Tensor, centers: Tensor) -> float:
    """Share of canvases whose highest value is at the centre's pixel.

    Args:
        logits: Shape ``(N, 64 * 64)``.
        centers: Pixels (x, y), shape ``(N, 2)``.
    """
    return (logits.argmax(1) == pixel_index(centers)).double().mean().item()


def mean_iou(logits: Tensor, drawn: Tensor) -> float:
    """Intersection over union of painted and true squares, the mean over canvases.

    A pixel is painted where the logit is above 0: the sigmoid, rounded at .5. Nothing
    painted is an IOU of 0, for no true square is empty.

    Args:
        logits: Shape ``(N, 1, 64, 64)``.
        drawn: The true squares, likewise.
    """
    painted, true = logits.flatten(1) > 0, drawn.flatten(1) > 0.5
    intersection = (painted & true).sum(1).double()
    return (intersection / (painted | true).sum(1)).mean().item()


def distances(found: Tensor, centers: Tensor) -> Tensor:
    """Euclidean distances in pixels, shape ``(N,)``, of positions (x, y) ``(N, 2)`` in pixels."""
    return (found - centers).double().norm(dim=1)
