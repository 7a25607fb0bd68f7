"""A view as HTML: a fragment for notebooks, or a page that needs no other file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from coordconv_patch.display.parts import Bar, Cell, Facts, Part, Row, Strip, Table

__all__ = ["fragment", "page"]

_STYLE = """
.ccp{--ink:#1b2733;--pale:#66717d;--line:#dde3e9;--mark:#e8f3ff;--bar:#2f7ed8;--block:#c4ced8;
color:var(--ink);font:14px/1.45 system-ui,sans-serif}
.ccp *{box-sizing:border-box}
.ccp h1{font-size:1.25em;margin:0 0 .6em}
.ccp details{margin:.5em 0}
.ccp summary{cursor:pointer;font-weight:600;padding:.2em 0}
.ccp .wide{overflow-x:auto}
.ccp table{border-collapse:collapse;margin:.3em 0 .8em;color:inherit;font-size:1em}
.ccp th,.ccp td{text-align:left;padding:.15em .9em .15em 0;border-bottom:1px solid var(--line);
white-space:nowrap;vertical-align:top;background:none}
.ccp th{font-weight:600}
.ccp .number{text-align:right;font-variant-numeric:tabular-nums}
.ccp td:first-child{font-family:ui-monospace,monospace;padding-left:.5em}
.ccp tr.strong td{background:var(--mark)}
.ccp tr.pale td{color:var(--pale)}
.ccp .facts td{white-space:normal;overflow-wrap:anywhere}
.ccp .facts td:first-child{font-family:inherit;color:var(--pale);white-space:nowrap}
.ccp .bar{display:inline-block;height:.75em;min-width:1px;background:var(--bar);border-radius:2px}
.ccp .track{display:inline-block;width:8em}
.ccp .strip{display:flex;align-items:flex-end;gap:1px;height:72px;margin:.4em 0 1em}
.ccp .strip span{flex:1 1 0;min-width:1px;max-width:24px;background:var(--block);
border-radius:1px 1px 0 0}
.ccp .strip .strong{background:var(--bar)}
.ccp p{margin:.3em 0;color:var(--pale);overflow-wrap:anywhere}
@media (prefers-color-scheme:dark){.ccp.page{--ink:#e4eaf0;--pale:#9aa6b2;--line:#35414d;
--mark:#16314d;--bar:#5aa2f0;--block:#4a5865}}
"""

_PAGE_STYLE = """
body{margin:0;background:#fff}
main{max-width:76em;margin:0 auto;padding:1.5em 1em}
@media (prefers-color-scheme:dark){body{background:#12181f}}
"""


def fragment(title: str, parts: Sequence[Part], notes: Sequence[str]) -> str:
    """The view as an element for a notebook's cell."""
    return f'<div class="ccp"><style>{_STYLE}</style>{_body(title, parts, notes)}</div>'


def page(title: str, parts: Sequence[Part], notes: Sequence[str]) -> str:
    """The view as a whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_PAGE_STYLE}{_STYLE}</style></head>\n"
        f'<body><main class="ccp page">{_body(title, parts, notes)}</main></body></html>\n'
    )


def _body(title: str, parts: Sequence[Part], notes: Sequence[str]) -> str:
    shown = "\n".join("".join(_part(part)) for part in parts)
    told = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<h1>{escape(title)}</h1>\n{told}\n{shown}"


def _part(part: Part) -> Iterator[str]:
    if isinstance(part, Facts):
        yield '<table class="facts">'
        for name, value in part.pairs:
            yield f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        yield "</table>"
    elif isinstance(part, Strip):
        yield f'<p>{escape(part.title)}</p><div class="strip" role="img">'
        for block in part.blocks:
            strong = ' class="strong"' if block.strong else ""
            height = max(0.0, min(block.height, 1.0))
            yield f'<span{strong} style="height:{height:.0%}" title="{escape(block.name)}"></span>'
        yield "</div>"
    elif part.title:
        yield f"<details{' open' if part.is_open else ''}><summary>{escape(part.title)}</summary>"
        yield from _table(part)
        yield "</details>"
    else:
        yield from _table(part)


def _table(table: Table) -> Iterator[str]:
    table, said = table.without_repetition()
    marked = any(row.mark for row in table.rows)
    yield '<div class="wide"><table><tr>'
    for column in table.columns:
        yield f"<th{_number(column.is_number)}>{escape(column.heading)}</th>"
    yield "</tr>\n"
    for row in table.rows:
        yield f"<tr{_look(row, marked)}>"
        for column, cell in zip(table.columns, row.cells, strict=True):
            yield f"<td{_number(column.is_number)}>{_cell(cell)}</td>"
        yield "</tr>\n"
    yield "</table></div>"
    if said:
        yield f"<p>{escape(said)}</p>"


def _number(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _look(row: Row, marked: bool) -> str:
    if not row.strong:
        return ' class="pale"'
    return ' class="strong"' if marked and row.mark else ""


def _cell(cell: Cell) -> str:
    if isinstance(cell, Bar):
        width = max(0.0, min(cell.share, 1.0))
        bar = f'<span class="bar" style="width:{width:.1%}"></span>' if width > 0 else ""
        return f'<span class="track">{bar}</span>'
    return escape(cell)
