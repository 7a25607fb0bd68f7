"""The result of a ranking: a table of gains, what stands out, and where nothing does."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from coordconv_patch.arguments import given
from coordconv_patch.display.parts import Column, Row, Table
from coordconv_patch.display.shown import Shown, View
from coordconv_patch.errors import ArgumentError
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.ranking.gains import Gain
from coordconv_patch.ranking.parts import Part
from coordconv_patch.ranking.picture import Bar, draw_ranking

__all__ = ["RankedPart", "Ranking"]


@dataclass(frozen=True)
class RankedPart:
    """A site or stage, and what coordinates there gained.

    Attributes:
        part: The site or stage.
        gain: What coordinates there, and nowhere else, took off the held-out loss.
        depth: Its position in the order of execution, from 0.
        steps: How many training steps it was tried for.
        finished: Whether these were long runs, or the one short run of the first round.
    """

    part: Part
    gain: Gain
    depth: int
    steps: int
    finished: bool

    @property
    def worthwhile(self) -> bool:
        """Whether the whole interval of its gain lies above 0, after long runs."""
        return self.finished and self.gain.low > 0


@dataclass(frozen=True, repr=False)
class Ranking(Shown):
    """What :func:`coordconv_patch.rank` gives. ``print(ranking)`` shows a table.

    Attributes:
        rows: The sites or stages, the largest gain first; those of the first round alone come
            after those with long runs.
        plain: Held-out loss without coordinates, before and after a long run.
        scrambled: What scrambled coordinates gain at the best of the worthwhile ones, if there are
            any: what a code of places gains that knows no left, right or near.
        coords: The convention of the coordinate channels.
        steps: Training steps of a long run.
        seeds: Long runs of each row that had any.
        cost: What the ranking took, in training steps of the plain model; a held-out batch
            counts a third.
        unreached: Sites that the loss does not run.
    """

    rows: tuple[RankedPart, ...]
    plain: tuple[float, float]
    scrambled: Gain | None
    coords: Coordinates
    steps: int
    seeds: int
    cost: float
    unreached: tuple[str, ...] = ()

    def top(self, count: int = 1) -> list[str]:
        """Names of the sites in the best ``count`` rows, as ``patch(where=...)`` takes them.

        Whether they gain anything or not: see :meth:`worthwhile`.

        Raises:
            ArgumentError: If the number is not a whole one from 1 to the number of rows.
        """
        if type(count) is not int or not 1 <= count <= len(self.rows):
            raise ArgumentError(
                f"{given('count', count)}: the ranking has {len(self.rows)} rows, write 1 to "
                f"{len(self.rows)}"
            )
        return [site for row in self.rows[:count] for site in row.part.sites]

    def worthwhile(self) -> list[str]:
        """Names of the sites in the rows whose gain lies above 0 with its whole interval.

        As ``patch(where=...)`` takes them; empty where nothing was shown to help.
        """
        return [site for row in self.rows if row.worthwhile for site in row.part.sites]

    def verdict(self) -> str:
        """In words: where coordinates help, or that they help nowhere."""
        before, after = self.plain
        training = (
            f"without coordinates the held-out loss went from {before:.3g} to {after:.3g} in "
            f"{self.steps} steps"
        )
        helpful = [row.part.name for row in self.rows if row.worthwhile]
        if not helpful:
            best = self.rows[0]
            return (
                f"nowhere: no gain lies above 0 with its whole interval (best: {best.part.name}, "
                f"{best.gain}); {training}"
            )
        lines = f"worthwhile: {', '.join(helpful)}; {training}"
        if self.scrambled is None:
            return lines
        return f"{lines}; scrambled coordinates at {helpful[0]} gain {self.scrambled}"

    def view(self) -> View:
        """The rows, their verdict below."""
        numbers = ("sites", "params", "steps", "gain", "low", "high")
        counted = [Column(heading, is_number=True) for heading in numbers]
        columns = (Column("where"), Column("input", rank=1), *counted)
        rows = tuple(self._row(row) for row in self.rows)
        notes = (self.verdict(), self._how())
        return View(f"gain of coordinates {self.coords}", (Table(columns, rows),), notes)

    def summary(self) -> str:
        """It in one line: the verdict."""
        return self.verdict()

    def _row(self, row: RankedPart) -> Row:
        part, gain = row.part, row.gain
        cells = (
            part.name,
            "\u00d7".join(map(str, part.input_size)),
            str(len(part.sites)),
            f"{part.parameters:,}",
            str(row.steps),
            *(f"{number:+.3g}" for number in (gain.value, gain.low, gain.high)),
        )
        return Row(cells, mark="+" if row.worthwhile else "", strong=row.worthwhile)

    def _how(self) -> str:
        unreached = (
            f"; {len(self.unreached)} sites that the loss does not run are left out"
            if self.unreached
            else ""
        )
        long = sum(row.finished for row in self.rows)
        short = len(self.rows) - long
        first = f"one run of {self.rows[-1].steps} steps of each, then " if short else ""
        last = f"of the best {long}" if short else "of each"
        return (
            f"95 % intervals for all rows at once; {first}{self.seeds} runs of {self.steps} steps "
            f"{last}, in all as much as {self.cost:,.0f} plain training steps{unreached}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The ranking as JSON-ready values."""
        return {
            "verdict": self.verdict(),
            "coords": self.coords.to_dict(),
            "plain": list(self.plain),
            "scrambled": self.scrambled and asdict(self.scrambled),
            "steps": self.steps,
            "seeds": self.seeds,
            "cost": self.cost,
            "unreached": list(self.unreached),
            "rows": [
                asdict(row.part)
                | {"depth": row.depth, "gain": asdict(row.gain), "worthwhile": row.worthwhile}
                | {"steps": row.steps, "finished": row.finished}
                for row in self.rows
            ],
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the gains as bars along the depth of the network: a PNG, SVG or PDF file.

        Raises:
            ArgumentError: If the name ends otherwise, the file cannot be written, or matplotlib
                is not installed.
        """
        best = next((row for row in self.rows if row.worthwhile), None)
        bars = [
            Bar(
                row.part.name,
                row.part.input_size,
                row.gain,
                row.worthwhile,
                row.finished,
                self.scrambled if row is best else None,
            )
            for row in sorted(self.rows, key=lambda row: row.depth)
        ]
        draw_ranking(bars, path)
