"""What a benchmark measured, as Markdown that can be pasted into an issue, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coordconv_patch.bench.machine import Machine
from coordconv_patch.display.parts import Bar, Column, Facts, Row, Table
from coordconv_patch.display.shown import Shown, View
from coordconv_patch.runtime.providers import CPU
from coordconv_patch.runtime.timing import Ratio

__all__ = [
    "NAIVE",
    "PLAIN",
    "PLAIN_AGAIN",
    "BenchGroup",
    "BenchReport",
    "BenchRow",
    "markdown_table",
]

PLAIN = "plain"
PLAIN_AGAIN = "plain again"
NAIVE = "naive concat"

_QUIET = 0.03
"""How far the interval of the plain model against itself may reach from 1."""


@dataclass(frozen=True)
class BenchRow:
    """One variant of the model.

    Attributes:
        name: ``"plain"``, ``"plain again"`` (the same file in another session), the
            lowering, or ``"naive concat"``.
        seconds: Median time of one run.
        ratio: Its median over the plain model's, with its interval.
        file_size: Bytes of its ONNX file.
    """

    name: str
    seconds: float
    ratio: Ratio
    file_size: int


@dataclass(frozen=True)
class BenchGroup:
    """What was timed together, the plain model first; threads are those within an operator.

    0 threads: ONNX Runtime's choice.
    """

    provider: str
    batch: int
    threads: int
    rows: tuple[BenchRow, ...]

    @property
    def title(self) -> str:
        """Provider, batch and, on the CPU, threads."""
        title = f"{self.provider}, batch {self.batch}"
        if self.provider != CPU:
            return title
        number = {0: "default threads", 1: "1 thread"}
        return f"{title}, {number.get(self.threads, f'{self.threads} threads')}"


@dataclass(frozen=True, repr=False)
class BenchReport(Shown):
    """What :func:`bench_onnx` measured. ``print(report)`` shows its Markdown.

    Attributes:
        groups: One for each provider, batch size and number of threads.
        repeats: Timed rounds of each group.
        sites: Number of patched sites.
        machine: Where it was measured.
        notes: What was left out, and what "auto" chose.
    """

    groups: tuple[BenchGroup, ...]
    repeats: int
    sites: int
    machine: Machine
    notes: tuple[str, ...] = ()

    def markdown(self, *, subject: str = "a model", command: str | None = None) -> str:
        """The report as Markdown that reads well on a terminal too.

        ``subject`` is the model's name, ``command`` what measured it.
        """
        lines = [f"### coordconv-patch bench: {subject}, {_sites(self.sites)}", ""]
        machine, versions = self.machine.lines()
        lines += [f"- command: `{command}`"] if command else []
        lines += [
            f"- machine: {machine}",
            f"- versions: {versions}",
            f"- {self.repeats} rounds, the variants in random order within each; ratios of medians "
            "to plain, with 95 % bootstrap intervals",
        ]
        lines += [f"- {note}" for note in (*self.notes, *self._unrest())]
        for group in self.groups:
            lines += ["", f"**{group.title}**", "", *_group_table(group)]
        return "\n".join(lines)

    def _unrest(self) -> list[str]:
        """A warning where the plain model against itself did not come out as 1."""
        against_itself = [
            row.ratio for group in self.groups for row in group.rows if row.name == PLAIN_AGAIN
        ]
        worst = max(against_itself, key=lambda ratio: ratio.unlike_one, default=None)
        if worst is None or worst.unlike_one <= _QUIET:
            return []
        return [
            f"the machine was not quiet: the plain model against itself gave {worst}. Stop what "
            "else runs, or raise --repeats"
        ]

    def __str__(self) -> str:
        return self.markdown()

    def summary(self) -> str:
        """One line: how many sites were patched, and what was timed."""
        groups = "; ".join(group.title for group in self.groups)
        return f"{_sites(self.sites)}, {self.repeats} rounds: {groups}"

    def view(self) -> View:
        """A table for each group, with times as bars."""
        machine, versions = self.machine.lines()
        facts = Facts((("machine", machine), ("versions", versions)))
        tables = (_table_of(group) for group in self.groups)
        rounds = f"{self.repeats} rounds; ratios of medians to plain, with 95 % bootstrap intervals"
        notes = (rounds, *self.notes, *self._unrest())
        return View(f"coordconv-patch bench: {_sites(self.sites)}", (facts, *tables), notes)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it; times in seconds, sizes in bytes."""
        return {
            "machine": self.machine.to_dict(),
            "repeats": self.repeats,
            "sites": self.sites,
            "notes": list(self.notes),
            "groups": [
                {
                    "provider": group.provider,
                    "batch": group.batch,
                    "threads": group.threads,
                    "variants": {
                        row.name: {
                            "seconds": row.seconds,
                            "ratio": row.ratio.value,
                            "ratio_95": [row.ratio.low, row.ratio.high],
                            "file_size": row.file_size,
                        }
                        for row in group.rows
                    },
                }
                for group in self.groups
            ],
        }


_HEADINGS = ("variant", "median ms", "ratio", "95 % interval", "file MB", "file growth")


def _sites(count: int) -> str:
    return f"{count} patched site{'s' if count != 1 else ''}"


def _table_of(group: BenchGroup) -> Table:
    slowest = max(row.seconds for row in group.rows)
    bars = [Bar(row.seconds / slowest) for row in group.rows]
    rows = tuple(
        Row((*cells, bar), strong=not cells[0].startswith(PLAIN))
        for cells, bar in zip(_cells(group), bars, strict=True)
    )
    name, *others = _HEADINGS
    ranks = (2, 0, 1, 4, 3)
    numbers = (Column(text, True, rank) for text, rank in zip(others, ranks, strict=True))
    return Table((Column(name), *numbers, Column("time", rank=5)), rows, group.title)


def _group_table(group: BenchGroup) -> list[str]:
    return markdown_table(_HEADINGS, _cells(group))


def _cells(group: BenchGroup) -> list[tuple[str, ...]]:
    """What a table says of each variant, in the order of the headings."""
    plain = group.rows[0].file_size
    return [
        (
            row.name,
            f"{row.seconds * 1e3:.3f}",
            f"{row.ratio.value:.3f}",
            f"{row.ratio.low:.3f} to {row.ratio.high:.3f}",
            f"{row.file_size / 1e6:.2f}",
            f"{row.file_size / plain - 1:+.1%}",
        )
        for row in group.rows
    ]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table with aligned columns; the first to the left, others to the right.

    ::

        | variant | ratio |
        |:--------|------:|
        | plain   | 1.000 |
    """
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return f"| {' | '.join(aligned)} |"

    rule = f"|:{'-' * (widths[0] + 1)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return [line(headings), rule, *map(line, rows)]
