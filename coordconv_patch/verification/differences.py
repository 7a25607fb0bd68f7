"""The largest difference between torch's outputs and those of an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["compare", "to_array"]


def to_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as ONNX Runtime's Python interface takes it; bfloat16 becomes float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def compare(expected: Sequence[Tensor], actual: Sequence[np.ndarray[Any, Any]]) -> float:
    """Largest difference over all outputs, each relative to its largest magnitude.

    Not-a-number agrees with itself; a difference in number or shape is infinite.
    """
    if len(expected) != len(actual):
        return float("inf")
    worst = 0.0
    for reference, array in zip(expected, actual, strict=True):
        left = reference.detach().cpu().to(torch.float64).numpy()
        right = np.asarray(array).astype(np.float64)
        if left.shape != right.shape or not np.array_equal(np.isnan(left), np.isnan(right)):
            return float("inf")
        if not left.size:
            continue
        finite = np.where(np.isfinite(left), np.abs(left), 0.0)
        with np.errstate(invalid="ignore"):
            apart = np.where(left == right, 0.0, np.abs(left - right))
        apart = np.where(np.isnan(left), 0.0, apart)
        scale = max(float(finite.max()), float(np.finfo(np.float32).tiny))
        worst = max(worst, float(apart.max()) / scale)
    return worst
