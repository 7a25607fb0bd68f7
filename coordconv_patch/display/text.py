"""A view as lines of text that fit a width.

Columns that do not fit are left out, the least important first; a name is never cut: where it
is wider than the line, it goes on in the next one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coordconv_patch.display.parts import Bar, Cell, Facts, Part, Row, Strip, Table

__all__ = ["Line", "lines_of"]

_GAP = 2
_BAR = 12
"""Characters of a full bar."""

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_NARROWEST = 20
"""Characters of the narrowest line of a note."""


@dataclass(frozen=True)
class Line:
    """A line, and how it is to look: ``"bold"``, ``"dim"`` or ``""``."""

    text: str
    style: str = ""


def lines_of(
    title: str, parts: Sequence[Part], notes: Sequence[str], width: int | None
) -> Iterator[Line]:
    """The lines of a view, none longer than ``width`` characters; ``None``: as long as need be."""
    yield from _wrapped(title, width, "bold")
    for part in parts:
        if isinstance(part, Strip):
            continue
        yield Line("")
        yield from _facts(part, width) if isinstance(part, Facts) else _table(part, width)
    if notes:
        yield Line("")
    for note in notes:
        yield from _wrapped(note, width, "", indent="  ")


def _wrapped(text: str, width: int | None, style: str, indent: str = "") -> Iterator[Line]:
    for line in text.splitlines():
        if width is None:
            yield Line(line, style)
            continue
        for piece in textwrap.wrap(line, max(width, _NARROWEST), subsequent_indent=indent):
            yield Line(piece, style)


def _facts(facts: Facts, width: int | None) -> Iterator[Line]:
    longest = max((len(name) for name, _ in facts.pairs), default=0) + _GAP
    if width is not None and width - longest < _NARROWEST:
        for name, value in facts.pairs:
            yield from _wrapped(f"{name}: {value}", width, "", indent="  ")
        return
    for name, value in facts.pairs:
        rest = None if width is None else width - longest
        for number, line in enumerate(_wrapped(value, rest, "")):
            yield Line((name if number == 0 else "").ljust(longest) + line.text)


def _table(table: Table, width: int | None) -> Iterator[Line]:
    table, said = table.without_repetition()
    if table.title:
        yield from _wrapped(table.title, width, "bold")
    marks = _GAP if any(row.mark for row in table.rows) else 0
    room = None if width is None else width - marks
    table = _fitting(table, room)
    widths = _widths(table)
    if room is not None:
        widths[0] = max(min(widths[0], room - sum(widths[1:]) - _GAP * len(widths[1:])), 1)
    headings = Row(tuple(column.heading for column in table.columns))
    for row in (headings, *table.rows):
        style = "bold" if row is headings else "" if row.strong else "dim"
        for line in _row(table, row, widths):
            mark = row.mark if line is not None and row.mark else ""
            yield Line(f"{mark:<{marks}}{line}".rstrip(), style)
    if said:
        yield from _wrapped(said, width, "dim")


def _fitting(table: Table, room: int | None) -> Table:
    """The table without the columns that a width leaves no room for."""
    while room is not None and len(table.columns) > 1:
        widths = _widths(table)
        if sum(widths) + _GAP * (len(widths) - 1) <= room:
            break
        ranks = [column.rank for column in table.columns[1:]]
        table = table.without(1 + max(range(len(ranks)), key=lambda index: (ranks[index], index)))
    return table


def _widths(table: Table) -> list[int]:
    columns = zip(*(row.cells for row in table.rows), strict=True)
    longest = [max(_BAR if isinstance(cell, Bar) else len(cell) for cell in c) for c in columns]
    longest = longest or [0] * len(table.columns)
    return [
        max(len(column.heading), widest)
        for column, widest in zip(table.columns, longest, strict=True)
    ]


def _row(table: Table, row: Row, widths: Sequence[int]) -> Iterator[str]:
    """A row's line, and further ones for a name that is wider than its column."""
    name = str(row.cells[0])
    pieces = [name[at : at + widths[0]] for at in range(0, len(name), widths[0])] or [""]
    others = [
        text.rjust(width) if column.is_number else text.ljust(width)
        for column, text, width in zip(
            table.columns[1:], map(_text, row.cells[1:]), widths[1:], strict=True
        )
    ]
    yield (" " * _GAP).join([pieces[0].ljust(widths[0]), *others])
    yield from pieces[1:]


def _text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    eighths = round(max(0.0, min(cell.share, 1.0)) * _BAR * 8)
    if cell.share > 0:
        eighths = max(eighths, 1)
    full, rest = divmod(eighths, 8)
    return _EIGHTHS[-1] * full + (_EIGHTHS[rest] if rest else "")
