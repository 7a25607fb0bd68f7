"""A result of any kind shows itself in a console, a notebook, a page and its repr."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from coordconv_patch import ArgumentError
from coordconv_patch.display.parts import Bar, Block, Column, Facts, Row, Strip, Table
from coordconv_patch.display.shown import Shown, View

EVIL = "<script>alert('x')</script> [red]&\""


@dataclass(frozen=True, repr=False)
class Ranking(Shown):
    names: tuple[str, ...]

    def summary(self) -> str:
        return f"{len(self.names)} sites"

    def view(self) -> View:
        rows = tuple(Row((name, Bar(1 / (i + 1))), "+") for i, name in enumerate(self.names))
        table = Table((Column("site"), Column("gain")), rows, title=EVIL, is_open=False)
        return View(EVIL, (Facts(((EVIL, EVIL),)), Strip(EVIL, (Block(EVIL, 2, True),)), table))


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def ranking() -> Ranking:
    return Ranking((EVIL, "conv1"))


def test_its_repr_is_its_summary(ranking: Ranking) -> None:
    assert repr(ranking) == "<Ranking: 2 sites>"


def test_rich_shows_what_print_shows_and_no_markup_of_names(
    ranking: Ranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    console = Console(width=60, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(ranking)
    coloured = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).rstrip() == str(ranking)
    assert "[red]" in coloured
    assert "\x1b[1m" in coloured


def test_a_notebook_gets_html_with_nothing_of_its_own_in_it(ranking: Ranking) -> None:
    read = Reader(ranking._repr_html_())
    assert read.open == []
    assert "script" not in {tag for tag, _ in read.tags}
    assert read.texts.count(EVIL) == 6  # heading, fact twice, strip, table's title, its row
    (block,) = [values for tag, values in read.tags if values.get("title")]
    assert block["title"] == EVIL
    assert block["style"] == "height:100%"


def test_a_page_stands_alone_and_bars_are_as_wide_as_shares(
    ranking: Ranking, tmp_path: Path
) -> None:
    ranking.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    read = Reader(text)
    assert read.open == []
    assert text.startswith("<!doctype html>")
    assert not re.search(r"https?://|src=|href=|url\(|@import", text)
    bars = [v["style"] for tag, v in read.tags if v.get("class") == "bar"]
    assert bars == ["width:100.0%", "width:50.0%"]
    assert [values for tag, values in read.tags if tag == "details"] == [{}]


def test_a_page_is_whole_or_not_there(ranking: Ranking, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArgumentError, match="cannot write"):
        ranking.to_html(tmp_path / "folder")
    with pytest.raises(ArgumentError, match="path=3 is an int"):
        ranking.to_html(3)  # type: ignore[arg-type]
    assert list((tmp_path / "folder").iterdir()) == []
