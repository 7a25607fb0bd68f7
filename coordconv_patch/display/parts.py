"""What a view is put together from: tables, facts and strips of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

__all__ = ["Bar", "Block", "Cell", "Column", "Facts", "Part", "Row", "Strip", "Table"]


@dataclass(frozen=True)
class Bar:
    """A share of the largest value in its column, from 0 to 1, drawn as a bar."""

    share: float


Cell: TypeAlias = "str | Bar"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: What stands above it.
        is_number: Whether its cells stand to the right.
        rank: Where there is too little width, columns of the largest rank are left out first.
    """

    heading: str
    is_number: bool = False
    rank: int = 0


@dataclass(frozen=True)
class Row:
    """A row of a table: a cell for each column, and a mark of one character before them.

    A row that is not ``strong`` is shown paler.
    """

    cells: tuple[Cell, ...]
    mark: str = ""
    strong: bool = True


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first column has their names and is never left out or cut.

    HTML can fold a table with a title; ``is_open`` says whether it begins unfolded.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    is_open: bool = True

    def without(self, index: int) -> Table:
        """The table without one column."""
        rows = (
            replace(row, cells=(*row.cells[:index], *row.cells[index + 1 :])) for row in self.rows
        )
        columns = (*self.columns[:index], *self.columns[index + 1 :])
        return replace(self, columns=columns, rows=tuple(rows))

    def without_repetition(self) -> tuple[Table, str]:
        """The table without columns that say the same in each of several rows, and what they say.

        Empty columns are left out without a word.
        """
        table, said = self, []
        for index in reversed(range(1, len(self.columns))):
            values = {row.cells[index] for row in self.rows}
            (value, *others) = values or {""}
            if others or (len(self.rows) < 2 and value != ""):
                continue
            table = table.without(index)
            if isinstance(value, str) and value:
                said.append(f"{self.columns[index].heading} {value}")
        return table, f"every row: {', '.join(reversed(said))}" if said else ""


@dataclass(frozen=True)
class Facts:
    """Names and values, a line each."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Block:
    """One of a strip's blocks: its name, height from 0 to 1, and whether it stands out."""

    name: str
    height: float
    strong: bool


@dataclass(frozen=True)
class Strip:
    """Blocks in a row, each as high as something is large; only HTML shows it."""

    title: str
    blocks: Sequence[Block]


Part: TypeAlias = "Table | Facts | Strip"
