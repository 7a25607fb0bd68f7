"""Time several actions side by side, and say how sure the ratios are.

Absolute times drift on any machine: its clock, its neighbours and its temperature
change within a minute. So the actions take turns, every round in another order
(what ran just before leaves its mark on the caches), and what is reported is the
ratio of medians within one run::

    ratio = median(t_1 ... t_R) / median(b_1 ... b_R)

with a 95 % interval by the bootstrap (Efron 1979): the R rounds are drawn again with
replacement, the same rounds for both, so that a drift that hit both cancels.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordconv_patch.display.progress import progress_over
from coordconv_patch.errors import ArgumentError

__all__ = ["Ratio", "alternate", "median", "ratio_of_medians"]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def unlike_one(self) -> float:
        """How far the interval reaches from 1, at its farther end."""
        return max(abs(self.low - 1), abs(self.high - 1))

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def alternate(
    runs: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warm_up: int = 3,
    description: str = "timing",
) -> dict[str, list[float]]:
    """Seconds of every run of each action; all take turns, in a new order each round.

    Args:
        runs: The actions by name. Each must return only when its work is done.
        repeats: Rounds.
        warm_up: Rounds before the first that counts.
        description: What the progress bar says.

    Returns:
        ``repeats`` times in seconds for each name; entry i of all names is round i.

    Raises:
        ArgumentError: If there is no action, or no round.
    """
    if not runs or repeats < 1:
        raise ArgumentError(
            f"{len(runs)} actions, repeats={repeats}: give at least one action and one repeat"
        )
    order = list(runs)
    shuffler = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rounds = range(-warm_up, repeats)
    for number in progress_over(rounds, description, unit="rounds", alike=True):
        shuffler.shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            spent = time.perf_counter() - start
            if number >= 0:
                seconds[name].append(spent)
    return seconds


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number the mean of the middle two."""
    return float(statistics.median(values))


def ratio_of_medians(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """How long one action took against a base, in the same rounds of :func:`alternate`."""
    if len(values) != len(base):
        raise ArgumentError(
            f"{len(values)} rounds against {len(base)}: both must come from the same run of "
            "alternate()"
        )
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(base), size=(_RESAMPLES, len(base)))
    medians, base_medians = (np.median(np.asarray(x)[drawn], axis=1) for x in (values, base))
    ratios = medians / base_medians
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(median(values) / median(base), float(low), float(high))
