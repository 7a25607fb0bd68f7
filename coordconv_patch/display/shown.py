"""Results that show themselves wherever they are looked at.

A result tells what there is to see (:meth:`Shown.view`) and says it in one line
(:meth:`Shown.summary`). From these it is printed at the terminal's width, coloured by rich,
shown as HTML in notebooks, and written as an HTML page; ``repr`` stays one line.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from coordconv_patch.arguments import check_path
from coordconv_patch.display.html import fragment, page
from coordconv_patch.display.parts import Part
from coordconv_patch.display.text import Line, lines_of
from coordconv_patch.errors import ArgumentError
from coordconv_patch.files.atomic import replacement

__all__ = ["Shown", "View"]


class Shown:
    """A base for results: give :meth:`view` and :meth:`summary`, and it can be shown.

    A subclass that is a dataclass is declared with ``repr=False``.
    """

    def view(self) -> View:
        """What there is to see, short enough for a terminal or a notebook."""
        raise NotImplementedError

    def whole_view(self) -> View:
        """What a page of its own shows: all there is."""
        return self.view()

    def summary(self) -> str:
        """It in one line."""
        raise NotImplementedError

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write it as one HTML page that needs no other file and no network.

        Raises:
            ArgumentError: If the file cannot be written; there is none then.
        """
        view = self.whole_view()
        text = page(view.title, view.parts, view.notes)
        with replacement(check_path("path", path), ArgumentError) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _lines(self, width: int | None) -> Iterator[Line]:
        view = self.view()
        return lines_of(view.title, view.parts, view.notes, width)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary()}>"

    def __str__(self) -> str:
        """As wide as the terminal; where there is none, as wide as need be."""
        width = shutil.get_terminal_size(fallback=(0, 0)).columns
        return "\n".join(line.text for line in self._lines(width or None))

    def __rich__(self) -> Any:
        """What rich prints, as wide as its console."""
        return _InRich(self)

    def _repr_html_(self) -> str:
        view = self.view()
        return fragment(view.title, view.parts, view.notes)


@dataclass(frozen=True, repr=False)
class View(Shown):
    """Something to look at: a title, parts below it, and notes at its end."""

    title: str
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()

    def view(self) -> View:
        """The view itself."""
        return self

    def summary(self) -> str:
        """Its title."""
        return self.title


class _InRich:
    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text  # rich asked, so it is there

        for line in self._shown._lines(options.max_width):
            yield Text(line.text, style=line.style, no_wrap=True, overflow="ignore")
