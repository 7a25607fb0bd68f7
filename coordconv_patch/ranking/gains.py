"""Gains with their intervals: held-out losses of the plain runs less those with coordinates.

Two things blur a gain: which order the training batches came in (S seeds), and which batches were
held out (B of them). With d[s, b] the difference for one seed and one held-out batch::

    gain = mean of d        variance = V / S + W / B

V is the variance over the seeds of the batches' mean, W the variance over the batches of the seeds'
mean. Three seeds tell little of V, so that of a part is no less than the mean over all parts. The
intervals hold for all parts at once: with n of them each has the confidence 1 - 0.05 / n
(Bonferroni), by Student's t with the fewer of n (S - 1) and B - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gain", "gains_of", "student_quantile"]

_ERROR_RATE = 0.05
"""Of all intervals together."""


@dataclass(frozen=True)
class Gain:
    """What coordinates take off the held-out loss, in its unit; below 0: they add to it.

    Attributes:
        value: The mean over seeds and held-out batches.
        low: Lower end of its interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


def gains_of(differences: Sequence[Tensor], comparisons: int | None = None) -> list[Gain]:
    """Gains of parts that were measured alike.

    Args:
        differences: For each part ``(S, B)``: losses without coordinates less those with them.
        comparisons: How many intervals are to hold at once; ``None``: as many as there are parts.
    """
    together = torch.stack(list(differences)).double()
    parts, seeds, batches = together.shape
    values = together.mean((1, 2))
    over_seeds = together.mean(2).var(1) if seeds > 1 else torch.zeros(parts)
    over_seeds = over_seeds.maximum(over_seeds.mean())
    over_batches = together.mean(1).var(1)
    errors = (over_seeds / seeds + over_batches / batches).sqrt()
    freedom = batches - 1 if seeds == 1 else min(parts * (seeds - 1), batches - 1)
    factor = student_quantile(1 - _ERROR_RATE / (comparisons or parts) / 2, freedom)
    return [
        Gain(float(value), float(value - factor * error), float(value + factor * error))
        for value, error in zip(values, errors, strict=True)
    ]


def student_quantile(probability: float, freedom: int) -> float:
    """A quantile of Student's t distribution, by bisection of its distribution function.

    The function is a finite sum for a whole number of degrees of freedom (Abramowitz and Stegun
    1964, 26.7.3 and 26.7.4).

    Args:
        probability: Above 0.5 and below 1.
        freedom: Degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        if _within(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, freedom: int) -> float:
    """The probability that Student's t lies between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine_squared = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for index in range(1 + odd, freedom, 2):
        total += term
        term *= cosine_squared * index / (index + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
