"""Gains with their intervals: held-out losses of the plain runs less those with coordinates.

Two things blur a gain: which order the training batches came in (S runs), and which batches were
held out (B of them). Two or three runs tell too little of the first to estimate it, so each
run has an interval of its own, by Student's t over its B differences, and a gain's interval
reaches from the lowest end of theirs to the highest: what lies above 0 did so in every
run. The intervals hold for all parts at once: with n of them each has the confidence
1 - 0.05 / n (Bonferroni).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Gain", "gain_of", "student_quantile"]

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


def gain_of(differences: Tensor, comparisons: int = 1) -> Gain:
    """The gain of one part.

    Args:
        differences: ``(S, B)``: losses without coordinates less those with them.
        comparisons: How many intervals are to hold at once.
    """
    differences = differences.double()
    batches = differences.shape[1]
    factor = student_quantile(1 - _ERROR_RATE / comparisons / 2, batches - 1)
    means = differences.mean(1)
    halves = factor * (differences.var(1) / batches).sqrt()
    low, high = (means - halves).min(), (means + halves).max()
    return Gain(float(differences.mean()), float(low), float(high))


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
