"""How well boxes fit the digits, measured in two ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou


def iou_of_best_boxes(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The released code's measure: each kept box's IOU with the digit it fits best, on average.

    Args:
        found: The boxes kept of each picture, ``(M, 4)`` each, x0, y0, x1, y1.
        truth: The digits' boxes of each picture, ``(D, 4)`` each.

    Returns:
        Mean over the boxes of a picture, then over the pictures; a picture without any digit
        is left out, one without any box counts 0.
    """
    pictures = [
        float(box_iou(boxes, digits).amax(1).mean()) if len(boxes) else 0.0
        for boxes, digits in zip(found, truth, strict=True)
        if len(digits)
    ]
    return sum(pictures) / len(pictures)


def digit_ious(found: Tensor, truth: Tensor) -> Tensor:
    """Each digit's IOU with its box: one to one, so that the sum is the largest possible.

    Args:
        found: The boxes kept of one picture, ``(M, 4)``, x0, y0, x1, y1.
        truth: The digits' boxes, ``(D, 4)``.

    Returns:
        Shape ``(D,)``; 0 for a digit that gets no box.
    """
    overlap = box_iou(found, truth)
    rows, columns = map(torch.as_tensor, linear_sum_assignment(overlap.numpy(), maximize=True))
    ious = torch.zeros(len(truth))
    ious[columns] = overlap[rows, columns]
    return ious


def touches_edge(boxes: Tensor, canvas: int) -> Tensor:
    """Whether boxes ``(..., 4)`` reach an edge of the canvas: the digit is cut off there."""
    return ((boxes <= 0) | (boxes >= canvas)).any(-1)
