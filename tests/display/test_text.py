"""Views as text: what fits, what is left out, and what a reader of a table is told once."""

from __future__ import annotations

import pytest

from coordconv_patch.display.parts import Bar, Column, Facts, Row, Table
from coordconv_patch.display.shown import View

TABLE = Table(
    (Column("name"), Column("first", True, rank=2), Column("second", True), Column("share")),
    (
        Row(("a", "1", "22", Bar(1.0)), mark="+"),
        Row(("long.name", "333", "4", Bar(0.5)), strong=False),
    ),
)


def lines(view: View, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    return str(view).splitlines()


def test_a_table_has_its_names_first_and_numbers_to_the_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lines(View("title", (TABLE,), ("note",)), 80, monkeypatch) == [
        "title",
        "",
        "  name       first  second  share",
        "+ a              1      22  ████████████",
        "  long.name    333       4  ██████",
        "",
        "note",
    ]


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (40, ["name", "first", "second", "share"]),
        (39, ["name", "second", "share"]),
        (32, ["name", "second"]),
        (31, ["name", "second"]),
        (18, ["name"]),
    ],
)
def test_columns_of_the_largest_rank_are_left_out_first_and_the_last_of_equals(
    width: int, columns: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = lines(View("t", (TABLE,)), width, monkeypatch)
    assert shown[2].split() == columns
    assert max(map(len, shown)) <= width


def test_a_name_wider_than_the_line_goes_on_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table((Column("n"), Column("x")), (Row(("abcdefghijkl", "1")), Row(("z", "2"))))
    assert lines(View("t", (table,)), 5, monkeypatch)[2:] == ["n", "abcde", "fghij", "kl", "z"]


def test_what_every_row_says_is_said_once_and_empty_columns_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = (Column("name"), Column("kind"), Column("empty"), Column("calls"))
    rows = (Row(("a", "Conv2d", "", "1")), Row(("b", "Conv2d", "", "1")))
    table = Table(columns, rows)
    assert lines(View("t", (table,)), 80, monkeypatch)[2:] == [
        "name",
        "a",
        "b",
        "every row: kind Conv2d, calls 1",
    ]
    one = Table(columns, rows[:1])
    assert lines(View("t", (one,)), 80, monkeypatch)[2:] == [
        "name  kind    calls",
        "a     Conv2d  1",
    ]


def test_an_empty_table_has_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(View("t", (Table(TABLE.columns, ()),)), 80, monkeypatch)[2:] == ["name"]


def test_facts_are_wrapped_beside_their_names_or_below_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = View("t", (Facts((("size", "12 MB"), ("nodes", "one two three four five six"))),))
    assert lines(view, 30, monkeypatch)[2:] == [
        "size   12 MB",
        "nodes  one two three four five",
        "       six",
    ]
    assert lines(view, 22, monkeypatch)[2:] == [
        "size: 12 MB",
        "nodes: one two three",
        "  four five six",
    ]


@pytest.mark.parametrize(
    ("share", "bar"),
    [(0.0, ""), (1e-9, "▏"), (0.5, "██████"), (0.51, "██████▏"), (7.0, "█" * 12), (-1.0, "")],
)
def test_a_bar_has_eighths_of_a_character(
    share: float, bar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table((Column("n"), Column("b")), (Row(("a", Bar(share))), Row(("b", Bar(0.3)))))
    assert lines(View("t", (table,)), 80, monkeypatch)[3] == f"a  {bar}".rstrip()


def test_where_there_is_no_terminal_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "word " * 60
    assert lines(View("t", (TABLE,), (long,)), 0, monkeypatch)[-1] == long
