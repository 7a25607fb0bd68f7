"""How a plan is shown: a row for each stage, or for each site, with the cost as a bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from coordconv_patch.display.parts import Bar, Block, Cell, Column, Part, Row, Strip, Table
from coordconv_patch.display.shown import View
from coordconv_patch.errors import listing
from coordconv_patch.layers.geometry import Call
from coordconv_patch.patching.plan_row import PlanRow
from coordconv_patch.sites.stages import Stage, stages_of

__all__ = ["scaled", "view_by_site", "view_by_stage", "whole_view"]

_STAGE_COLUMNS = (
    Column("stage"),
    Column("convs", is_number=True, rank=2),
    Column("chosen", is_number=True, rank=1),
    Column("output", is_number=True, rank=5),
    Column("weights", is_number=True, rank=4),
    Column("MAdds", is_number=True, rank=3),
    Column("cost", rank=0),
)
_SITE_COLUMNS = (
    Column("site"),
    Column("class", rank=6),
    Column("geometry", rank=2),
    Column("input", is_number=True, rank=7),
    Column("output", is_number=True, rank=4),
    Column("calls", is_number=True, rank=5),
    Column("weights", is_number=True, rank=3),
    Column("MAdds", is_number=True, rank=1),
    Column("cost", rank=0),
)


def view_by_stage(title: str, rows: Sequence[PlanRow], told: Iterable[str]) -> View:
    """A row for each stage of the model.

    Args:
        title: What stands above.
        rows: The plan's rows.
        told: What stands below; more about some of the sites follows.
    """
    return View(title, (_stage_table(rows),), (*told, *_notes(rows)))


def view_by_site(title: str, rows: Sequence[PlanRow], told: Iterable[str]) -> View:
    """A row for each site; the arguments are those of :func:`view_by_stage`."""
    return View(title, (_site_table(rows),), (*told, *_notes(rows)))


def whole_view(title: str, rows: Sequence[PlanRow], told: Iterable[str]) -> View:
    """The model in order of execution: a strip of all sites, the stages, and the sites of each."""
    most = _most_work(rows)
    stages: list[Part] = [
        replace(
            _site_table(stage.members, most),
            title=_stage_title(stage),
            is_open=any(row.chosen or row.site.patched for row in stage.members),
        )
        for stage in _stages(rows)
    ]
    parts = (*_strips(rows), _stage_table(rows), *stages)
    return View(title, parts, (*told, *_notes(rows)))


def scaled(count: int) -> str:
    """A count with a decimal prefix: 1.2 M."""
    value = float(count)
    for prefix in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g} T"


def _stages(rows: Sequence[PlanRow]) -> tuple[Stage[PlanRow], ...]:
    return stages_of(rows, lambda row: row.site.name)


def _stage_title(stage: Stage[PlanRow]) -> str:
    chosen = sum(row.chosen for row in stage.members)
    return f"{stage.name} ({chosen} of {len(stage.members)} chosen)"


def _stage_table(rows: Sequence[PlanRow]) -> Table:
    stages = _stages(rows)
    works = [sum(map(_work, stage.members)) for stage in stages]
    most = max(works, default=0)
    shown = tuple(
        _stage_row(stage, work / most if most else 0.0)
        for stage, work in zip(stages, works, strict=True)
    )
    return Table(_STAGE_COLUMNS, shown)


def _stage_row(stage: Stage[PlanRow], share: float) -> Row:
    chosen = [row for row in stage.members if row.chosen]
    known = all(row.multiply_adds is not None for row in chosen)
    calls = [call for row in stage.members for call in row.site.calls or ()]
    cells: tuple[Cell, ...] = (
        stage.name,
        str(len(stage.members)),
        str(len(chosen)) if chosen else "",
        _stage_output(calls),
        f"{sum(row.parameters for row in chosen):,}" if chosen else "",
        scaled(sum(row.multiply_adds or 0 for row in chosen)) if chosen and known else "",
        Bar(share) if chosen else "",
    )
    return Row(cells, _mark(stage.members), strong=bool(chosen))


def _stage_output(calls: Sequence[Call]) -> str:
    """The size that a stage ends with; of one that works at many, as a pyramid does, some of them.

    Sizes of one pixel are those of gates beside the way, and left out.
    """
    images = [call for call in calls if math.prod(call.output_size) > 1] or list(calls)
    at_many = len({call.output_size for call in images}) > 2
    return _sizes(images if at_many else images[-1:], "output_size")


def _site_table(rows: Sequence[PlanRow], most: int | None = None) -> Table:
    most = _most_work(rows) if most is None else most
    return Table(_SITE_COLUMNS, tuple(_site_row(row, most) for row in rows))


def _site_row(row: PlanRow, most: int) -> Row:
    site, madds = row.site, row.multiply_adds
    cells: tuple[Cell, ...] = (
        site.name,
        site.class_name,
        "?" if site.geometry is None else str(site.geometry),
        _sizes(site.calls, "input_size"),
        _sizes(site.calls, "output_size"),
        "" if site.calls is None else str(len(site.calls)),
        f"{row.parameters:,}" if row.chosen else "",
        scaled(madds) if row.chosen and madds is not None else "",
        Bar(_work(row) / most if most else 0.0) if row.chosen else "",
    )
    return Row(cells, _mark([row]), strong=row.chosen)


def _strips(rows: Sequence[PlanRow]) -> Iterator[Strip]:
    """The architecture as a strip of blocks, as high as what each site gives out is large."""
    sizes = [math.prod(row.site.calls[0].output_size) if row.site.calls else 0 for row in rows]
    largest = max(sizes, default=0)
    if largest < 2:
        return
    blocks = [
        Block(
            f"{row.site.name}, {_sizes(row.site.calls, 'output_size') or 'never called'}",
            0.04 + 0.96 * math.log2(size + 1) / math.log2(largest + 1),
            row.chosen or row.site.patched,
        )
        for row, size in zip(rows, sizes, strict=True)
    ]
    yield Strip(
        "Convolutions in order of execution, as high as the logarithm of their outputs' pixels; "
        "those with coordinates in colour",
        blocks,
    )


def _mark(rows: Iterable[PlanRow]) -> str:
    rows = list(rows)
    if any(row.chosen for row in rows):
        return "+"
    return "=" if any(row.site.patched for row in rows) else ""


def _work(row: PlanRow) -> int:
    """What a bar shows: multiply-adds, or weights where sizes are unknown."""
    return row.parameters if row.multiply_adds is None else row.multiply_adds


def _most_work(rows: Iterable[PlanRow]) -> int:
    return max(map(_work, rows), default=0)


def _sizes(calls: Sequence[Call] | None, field: str) -> str:
    unique = dict.fromkeys(getattr(call, field) for call in calls or ())
    shown = ["\u00d7".join(map(str, size)) for size in unique]
    return ", ".join(shown[:2]) + (", ..." if len(shown) > 2 else "")


def _notes(rows: Sequence[PlanRow]) -> Iterator[str]:
    """What the tables do not say of some sites."""
    # Of a survey, which chooses nothing, all notes are told.
    note = _note if any(row.chosen for row in rows) else _any_note
    for text in (_why_chosen, note, _why_not):
        yield from _grouped(rows, text)
    if any(row.chosen and row.multiply_adds is None for row in rows):
        yield "sizes are unknown, so the bars compare weights: pass example_inputs"


def _note(row: PlanRow) -> str:
    return row.note if row.chosen or row.site.patched else ""


def _any_note(row: PlanRow) -> str:
    return row.note


def _why_chosen(row: PlanRow) -> str:
    return f"+ {row.reason}" if row.chosen else ""


def _why_not(row: PlanRow) -> str:
    if row.site.patched:
        return f"= {row.reason}"
    return f"cannot be patched: {row.site.obstacle}" if row.site.obstacle else ""


def _grouped(rows: Iterable[PlanRow], text: Callable[[PlanRow], str]) -> Iterator[str]:
    """What is said of sites, each once with the sites that it is said of."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        said = text(row)
        if said:
            groups.setdefault(said, []).append(row.site.name or "the model")
    for said, names in groups.items():
        yield f"{said}: {listing(names)}"
