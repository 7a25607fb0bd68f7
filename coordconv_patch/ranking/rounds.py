"""How long the runs of a ranking are: short ones of all parts, long ones of the best.

Coordinates in a net that is blind to places need some dozens of steps before they take anything
off the loss, so what few steps gain foretells little, and as many for every part would cost too
much. One round of successive halving (Jamieson and Talwalkar 2016,
https://arxiv.org/abs/1502.07943) spends most steps on the parts that begin well.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Rounds", "rounds_within"]

_FORWARD = 1 / 3
"""What a forward pass costs, in training steps."""
_FIRST = 20
_MOST_STEPS = 100
_FEWEST_STEPS = 4
_FEWEST_FINALISTS = 2
_ONE_FINALIST_OF = 4


@dataclass(frozen=True)
class Rounds:
    """The two rounds.

    Attributes:
        first: Steps of the one run that each part has in the first round; 0: there is none.
        finalists: How many parts are in the second.
        steps: Steps of a run there.
        seeds: Runs of each there.
    """

    first: int
    finalists: int
    steps: int
    seeds: int

    def training_steps(self, parts: int) -> int:
        """Steps of all runs: also of the plain model and, at the best part, of the control."""
        return self._first_runs(parts) * self.first + self._last_runs() * self.steps

    def cost(self, parts: int, held_out: int) -> float:
        """All runs and measurements, in training steps of the plain model.

        Args:
            parts: How many are ranked.
            held_out: On how many batches is measured; one costs a third of a step.
        """
        measured = (self._first_runs(parts) + self._last_runs()) * held_out
        return self.training_steps(parts) + measured * _FORWARD

    def _first_runs(self, parts: int) -> int:
        return parts + 1 if self.first else 0

    def _last_runs(self) -> int:
        return (self.finalists + 2) * self.seeds


def rounds_within(
    budget: float, parts: int, seeds: int, held_out: int, steps: int | None = None
) -> Rounds:
    """The rounds of a ranking that is to cost so many plain training steps.

    Args:
        budget: In training steps of the plain model.
        parts: How many are ranked.
        seeds: Runs of each finalist.
        held_out: On how many batches is measured.
        steps: Steps of the long runs; ``None``: by the budget.
    """
    finalists = min(parts, max(_FEWEST_FINALISTS, parts // _ONE_FINALIST_OF))
    first = 0 if finalists == parts else min(_FIRST, steps or _FIRST)
    if steps is None:
        left = budget - Rounds(first, finalists, 0, seeds).cost(parts, held_out)
        each = int(left / ((finalists + 2) * seeds))
        steps = max(_FEWEST_STEPS, min(_MOST_STEPS, each))
    return Rounds(first, finalists, steps, seeds)
