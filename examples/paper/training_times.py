"""How much sooner one net reaches another's best result, by the curves of their training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Curves = Mapping[str, Sequence[float]]
"""Of a run in a record: ``"CPU seconds"`` of training, and the ``"test"`` score by then."""


def seconds_to(curves: Curves, level: float, *, higher_is_better: bool) -> float | None:
    """CPU seconds after which the test curve first reached a level, if it did."""
    for seconds, value in zip(curves["CPU seconds"], curves["test"], strict=True):
        if value >= level if higher_is_better else value <= level:
            return seconds
    return None


def times_sooner(curves: Curves, plain: Curves, *, higher_is_better: bool) -> float | None:
    """How many times sooner than the plain net its best test score was reached, if it was.

    Raises:
        ValueError: If the plain net never scored at all: its best is then no result.
    """
    best = max(plain["test"]) if higher_is_better else min(plain["test"])
    if higher_is_better and best <= 0:
        raise ValueError("the plain net's test score stayed 0: there is nothing to reach")
    own = seconds_to(curves, best, higher_is_better=higher_is_better)
    other = seconds_to(plain, best, higher_is_better=higher_is_better)
    return None if own is None or other is None else other / own
