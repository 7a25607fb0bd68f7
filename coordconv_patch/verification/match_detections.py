"""Compare what two runs of a detector found, as sets of detections and not row by row.

A detector ends in decisions: a score threshold, a best-so-many, non-maximum
suppression. Where one hangs on the last digits, two right computations of one model
find another order, or a detection more or less. So detections are matched by label,
box and score, one to one, and a detection that only one side has is accepted only if
torch itself, computed with other rounding, wavers on it too:

- one that the file lacks must be lacking in some rounding of the torch model;
- one that only the file has must be found in some rounding of the torch model, beside
  all that the file shares with torch;
- and at least half of the detections must be there on both sides.

A mask or a key point of a matched detection may jump likewise (a box edge that rounds
to another pixel, the better of two equal maxima), if some rounding makes that jump.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from coordconv_patch.verification.detections import Array, Detections

__all__ = ["DetectionAgreement", "compare_detections"]

_LARGEST_MOVE = 1e-2
"""Rounding that moves a box or a score by more than this share of the largest is a jump."""

_SHOWN = 4
"""Differing detections that a message describes."""

_TIES = (
    "These detections have scores that others have too, to the last bit, and which of equals a "
    "detector keeps is left to chance: this input cannot tell whether the file is right. Compare "
    "on inputs, or with weights, that give each detection its own score"
)


@dataclass(frozen=True)
class DetectionAgreement:
    """How far a file's detections are torch's.

    Attributes:
        difference: Largest difference between matched detections, each field relative to
            its largest magnitude in torch.
        noise: How far rounding alone moves torch's detections; ``None`` if not measured.
        matched: Detections on both sides.
        unstable: Detections on one side only, or with a jump, that rounding accounts for.
        problems: What rounding does not account for, in words; empty if they agree.
        undecided: Why the problems say nothing for or against the file, in words; empty if they
            are its faults.
    """

    difference: float
    noise: float | None
    matched: int
    unstable: int
    problems: tuple[str, ...]
    undecided: str = ""


def compare_detections(
    expected: Detections, actual: Detections, roundings: Iterable[Detections], tolerance: float
) -> DetectionAgreement:
    """Match one picture's detections and say what rounding does not account for.

    Args:
        expected: Torch's detections.
        actual: The file's.
        roundings: Torch's detections computed with other rounding. They are drawn one
            by one, and only as long as something differs by more than allowed.
        tolerance: Largest difference allowed in any field, relative to its largest
            magnitude. Three times what rounding does is allowed too, up to a hundredth.
    """
    drawn: list[Detections] = []
    matching = _Match(expected, actual, drawn, tolerance)
    for rounding in roundings if matching.problems else ():
        drawn.append(rounding)
        matching = _Match(expected, actual, drawn, tolerance)
        if not matching.problems:
            break
    return DetectionAgreement(
        matching.difference,
        matching.noise,
        len(matching.pairs),
        matching.unstable,
        matching.problems,
        matching.undecided,
    )


class _Match:
    """One attempt to match; rows are numbered from 0, differences relative to each field's scale.

    ``pairs`` are the rows of torch's detections with their partners in the file's.
    """

    def __init__(
        self,
        expected: Detections,
        actual: Detections,
        roundings: Sequence[Detections],
        tolerance: float,
    ) -> None:
        self.expected, self.actual, self.roundings = expected, actual, roundings
        self.tolerance = tolerance
        self.noise = self._noise() if roundings else None
        self.allowed = self._allowed(self.noise)
        self.kept = [_pairs(self._apart(expected, other), self.allowed) for other in roundings]
        apart = self._apart(expected, actual)
        self.pairs = _pairs(apart, self.allowed)
        self.difference = max((float(apart[pair]) for pair in self.pairs.items()), default=0.0)
        partners = set(self.pairs.values())
        self.missing = [row for row in range(len(expected)) if row not in self.pairs]
        self.surplus = [row for row in range(len(actual)) if row not in partners]
        self.wavering = {row for row in self.missing if any(row not in kept for kept in self.kept)}
        self.wavering_surplus = self._surplus_in_roundings()
        self.jumped: set[int] = set()
        self.wrong_extras: dict[int, str] = {}
        for name in expected.extras:
            self._compare_extra(name)
        self.problems = self._problems()

    @property
    def unstable(self) -> int:
        """Detections that rounding makes appear, vanish or jump."""
        jumped = self.jumped.difference(self.wrong_extras)
        return len(self.wavering) + len(self.wavering_surplus) + len(jumped)

    @property
    def undecided(self) -> str:
        """Why these detections cannot tell whether the file is right; empty if they can."""
        if not self.problems or self.wrong_extras:
            return ""
        if self._few_are_shared():
            return "Compare on a picture with clearer objects"
        values, counts = np.unique(self.expected.scores, return_counts=True)
        tied = values[counts > 1]
        near = 2 * self.allowed * _scale(self.expected.scores)
        missing = [row for row in self.missing if row not in self.wavering]
        surplus = [row for row in self.surplus if row not in self.wavering_surplus]
        scores = [*self.expected.scores[missing], *self.actual.scores[surplus]]
        if not scores or not tied.size:
            return ""
        return _TIES if all(np.abs(tied - score).min() <= near for score in scores) else ""

    def _few_are_shared(self) -> bool:
        """Whether all is accounted for, but by rounding in more than half of the cases."""
        accounted = len(self.wavering) == len(self.missing)
        accounted = accounted and len(self.wavering_surplus) == len(self.surplus)
        return accounted and 2 * len(self.pairs) < max(len(self.expected), len(self.actual))

    def _allowed(self, noise: float | None) -> float:
        return max(self.tolerance, min(3 * (noise or 0.0), _LARGEST_MOVE))

    def _noise(self) -> float:
        """How far rounding moves boxes and scores, jumps left out."""
        moves = [0.0]
        for other in self.roundings:
            apart = self._apart(self.expected, other)
            moves += [float(apart[pair]) for pair in _pairs(apart, _LARGEST_MOVE).items()]
        return max(moves)

    def _apart(self, left: Detections, right: Detections) -> Array:
        """(M, M'): how far apart any two detections are; infinite with different labels."""
        scale = _scale(self.expected.boxes)
        apart = np.abs(left.scores[:, None] - right.scores[None]) / _scale(self.expected.scores)
        for edge in range(4):
            moved = np.abs(left.boxes[:, None, edge] - right.boxes[None, :, edge])
            apart = np.maximum(apart, moved / scale)
        return np.where(left.labels[:, None] == right.labels[None], apart, np.inf)

    def _surplus_in_roundings(self) -> set[int]:
        """Surplus rows that some rounding of torch finds beside those that both sides have."""
        rows: set[int] = set()
        for kept, other in zip(self.kept, self.roundings, strict=True):
            taken = {partner for row, partner in kept.items() if row in self.pairs}
            free = [row for row in range(len(other)) if row not in taken]
            apart = self._apart(self.actual, other)[np.ix_(self.surplus, free)]
            rows |= {self.surplus[row] for row in _pairs(apart, self.allowed)}
        return rows

    def _compare_extra(self, name: str) -> None:
        """Each element of a mask or key point must be torch's, or that of some rounding."""
        expected, actual = self.expected.extras[name], self.actual.extras[name]
        if expected.shape[1:] != actual.shape[1:]:
            self.wrong_extras |= dict.fromkeys(self.pairs, f"{name} (of another shape)")
            return
        scale, noise = _scale(expected), 0.0
        others = [
            (kept, other.extras[name])
            for kept, other in zip(self.kept, self.roundings, strict=True)
            if other.extras[name].shape[1:] == expected.shape[1:]
        ]
        for kept, other in others:
            for row, partner in kept.items():
                moved = _differences(expected[row], other[partner]) / scale
                noise = max(noise, float(moved[moved <= _LARGEST_MOVE].max(initial=0.0)))
        if self.noise is not None:
            self.noise = max(self.noise, noise)
        allowed = self._allowed(noise)
        for row, partner in self.pairs.items():
            apart = _differences(expected[row], actual[partner]) / scale
            if not (apart <= allowed).all():
                self.jumped.add(row)
                for rounded in [other[kept[row]] for kept, other in others if row in kept]:
                    apart = np.minimum(apart, _differences(rounded, actual[partner]) / scale)
            if (apart <= allowed).all():
                self.difference = max(self.difference, float(apart.max(initial=0.0)))
            else:
                self.wrong_extras[row] = name

    def _problems(self) -> tuple[str, ...]:
        told = [
            f"torch finds {self.expected.describe(row)}, the file does not{self._nearest(row)}"
            for row in self.missing
            if row not in self.wavering
        ]
        told += [
            f"the file finds {self.actual.describe(row)}, torch does not"
            for row in self.surplus
            if row not in self.wavering_surplus
        ]
        told += [
            f"the {name} of {self.expected.describe(row)} differ"
            for row, name in self.wrong_extras.items()
        ]
        largest = max(len(self.expected), len(self.actual))
        if not told and 2 * len(self.pairs) < largest:
            told.append(
                f"only {len(self.pairs)} of {largest} detections can be compared, rounding changes "
                "the others in torch itself"
            )
        if not told and not self._in_order():
            told.append("the file's detections are not sorted by score, as torch's are")
        hidden = len(told) - _SHOWN
        return (*told[:_SHOWN], f"and {hidden} more") if hidden > 0 else tuple(told)

    def _nearest(self, row: int) -> str:
        if not len(self.actual):
            return ", which finds nothing"
        moved = np.abs(self.actual.boxes - self.expected.boxes[row]).max(axis=1)
        return f" (its nearest: {self.actual.describe(int(moved.argmin()))})"

    def _in_order(self) -> bool:
        """Whether the file's are sorted by score, if torch's are, but for what rounding swaps."""
        if (np.diff(self.expected.scores) > 0).any():
            return True
        rises = np.diff(self.actual.scores).max(initial=0.0)
        return bool(rises <= 2 * self.allowed * _scale(self.expected.scores))


def _scale(values: Array) -> float:
    return max(float(np.abs(values).max(initial=0.0)), float(np.finfo(np.float32).tiny))


def _differences(left: Array, right: Array) -> Array:
    return np.abs(left.astype(np.float64) - right.astype(np.float64))


def _pairs(distances: Array, limit: float) -> dict[int, int]:
    """Pairs of rows and columns within a limit, nearest first, each used once."""
    rows, columns = np.nonzero(distances <= limit)
    order = np.lexsort((np.abs(rows - columns), distances[rows, columns]))
    pairs: dict[int, int] = {}
    used: set[int] = set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in pairs and column not in used:
            pairs[row] = column
            used.add(column)
            if len(used) == min(distances.shape):
                break
    return pairs
