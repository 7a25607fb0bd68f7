"""The result of one comparison of an ONNX file with the torch model."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """One comparison of the ONNX file with the torch model.

    Attributes:
        inputs: What it was run on.
        difference: Largest absolute difference over all outputs, each relative to the
            largest magnitude of that output in torch; between matched detections, where
            the outputs are such.
        tolerance: What was allowed.
        noise: The float32 torch model's own difference from float64; only measured when
            ``difference`` is above the tolerance asked for.
        detections: Detections that the file and torch share; ``None`` if the model is no
            detector. With 0 of them nothing was compared.
        unstable: Further detections that rounding makes appear, vanish or jump in torch
            itself.
    """

    inputs: str
    difference: float
    tolerance: float
    noise: float | None = None
    detections: int | None = None
    unstable: int = 0

    @property
    def agrees(self) -> bool:
        """Whether the difference is within what is allowed; an infinite one never is."""
        return math.isfinite(self.difference) and self.difference <= self.allowed

    @property
    def allowed(self) -> float:
        """The tolerance, or three times the rounding noise where that is more."""
        noise = self.noise or 0.0
        return max(self.tolerance, 3 * noise) if math.isfinite(noise) else self.tolerance
