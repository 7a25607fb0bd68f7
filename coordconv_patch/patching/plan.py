"""The dry run: which sites would be patched, what that costs, and why.

A plan changes nothing. It prints as a table, a row for each stage of the model, and its own
rows, one for each site, are values that a program can read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from coordconv_patch.display.shown import Shown, View
from coordconv_patch.errors import CoordinatesError
from coordconv_patch.graphs.programs import from_exported
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.patching.plan_notes import notes_on
from coordconv_patch.patching.plan_row import Cost, PlanRow
from coordconv_patch.patching.plan_view import scaled, view_by_site, view_by_stage, whole_view
from coordconv_patch.sites.find import find_sites
from coordconv_patch.sites.select import Choice, Where, not_chosen, select
from coordconv_patch.sites.site import Site, SiteMap
from coordconv_patch.sites.uncalled import joined_with_uncalled

__all__ = ["Plan", "plan", "plan_sites", "survey"]


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What :func:`coordconv_patch.patch` would do. ``print(plan)`` shows it by stages.

    Attributes:
        coords: The convention of the coordinate channels.
        rows: One row per site, in order of execution where it is known.
        site_map: The sites and the regions that they were found in.
        notes: What else to know about the model; often empty.
    """

    coords: Coordinates
    rows: tuple[PlanRow, ...]
    site_map: SiteMap
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> tuple[Site, ...]:
        """The sites that would be patched."""
        return tuple(row.site for row in self.rows if row.chosen)

    @property
    def parameters(self) -> int:
        """Coordinate weights added in all."""
        return sum(row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int | None:
        """Multiply-adds added to one forward pass; ``None`` if sizes are unknown."""
        counts = [row.multiply_adds for row in self.rows if row.chosen]
        if any(count is None for count in counts):
            return None
        return sum(count for count in counts if count is not None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {
            "coords": self.coords.to_dict(),
            "order_known": self.site_map.order_known,
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "notes": list(self.notes),
            "sites": [
                {
                    "name": row.site.name,
                    "kind": row.site.kind,
                    "class": row.site.class_name,
                    "geometry": row.site.geometry and row.site.geometry.to_dict(),
                    "calls": row.site.calls
                    and [[call.input_size, call.output_size] for call in row.site.calls],
                    "chosen": row.chosen,
                    "chosen_calls": row.choice.chosen_calls
                    and list(row.choice.chosen_calls.indices),
                    "reason": row.reason,
                    "note": row.note,
                    "parameters": row.parameters,
                    "multiply_adds": row.multiply_adds,
                }
                for row in self.rows
            ],
        }

    def view(self) -> View:
        """The plan by stages of the model, a row each."""
        return view_by_stage(self._title, self.rows, self._told)

    def by_site(self, *, chosen_only: bool = False) -> View:
        """The plan by sites: all of them, or the chosen ones alone. ``print`` shows it."""
        rows = [row for row in self.rows if row.chosen or not chosen_only]
        return view_by_site(self._title, rows, self._told)

    def whole_view(self) -> View:
        """What :meth:`to_html` writes: stages and sites in order of execution."""
        return whole_view(self._title, self.rows, self._told)

    @property
    def _title(self) -> str:
        return f"coordinates {self.coords}"

    @property
    def _told(self) -> tuple[str, ...]:
        return (self.summary(), *self.notes)

    def summary(self) -> str:
        """One line: sites chosen, weights and multiply-adds added."""
        madds = self.multiply_adds
        cost = "" if madds is None else f", {scaled(madds)} multiply-adds a forward pass"
        regions = self.site_map.regions
        whole = "traced whole" if not self.site_map.untraced else f"{len(regions)} traced regions"
        return (
            f"{len(self.chosen)} of {len(self.rows)} sites chosen, "
            f"{self.parameters:,} coordinate weights{cost} ({whole})"
        )


def plan(
    model: nn.Module | ExportedProgram,
    where: Where = "first",
    *,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
) -> Plan:
    """The dry run of :func:`coordconv_patch.patch`; the model is not changed.

    Args:
        model: Any module, a GraphModule, or a torch.export ExportedProgram.
        where: Which sites; see :func:`coordconv_patch.sites.select.select`.
        coords: The convention, or the name of a preset; ``None``: the paper's.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is
            keyword arguments). Adds sizes, calls and multiply-adds, and the order of
            execution where the model cannot be traced.

    Raises:
        SelectionError: If a selector matches nothing that can be patched.
        PatchError: If the forward pass fails on the example inputs.
    """
    module = from_exported(model) if isinstance(model, ExportedProgram) else model
    site_map = joined_with_uncalled(find_sites(module, example_inputs))
    convention = Coordinates.of(coords)
    return _of_model(plan_sites(site_map, where, convention), module)


def plan_sites(site_map: SiteMap, where: Where, coords: Coordinates) -> Plan:
    """The plan for sites that were found already."""
    rows = tuple(_row(choice, coords) for choice in select(site_map, where))
    return Plan(coords, rows, site_map)


def survey(
    model: nn.Module, *, coords: Coordinates | str | None = None, example_inputs: Any = None
) -> Plan:
    """A plan that chooses nothing: the sites of a model, and which of them are patched.

    The arguments, and what they raise, are those of :func:`plan`.
    """
    convention = Coordinates.of(coords)
    site_map = joined_with_uncalled(find_sites(model, example_inputs))
    choices = [not_chosen(site) for site in site_map.sites]
    rows = tuple(_row(choice, convention) for choice in choices)
    return _of_model(Plan(convention, rows, site_map), model)


def _of_model(decided: Plan, model: nn.Module) -> Plan:
    """A plan with notes on the model, and on the windows that its coordinate layers have."""
    layers = coord_layers(model)
    windows = {name: layer.coords.window for name, layer in layers.items() if layer.coords.window}
    rows = tuple(
        replace(row, note=_joined(row.note, f"its coordinates are those of {window}"))
        if (window := windows.get(row.site.name)) and row.site.patched
        else row
        for row in decided.rows
    )
    return replace(decided, rows=rows, notes=notes_on(decided.site_map, model))


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _row(choice: Choice, coords: Coordinates) -> PlanRow:
    calls = "" if choice.chosen_calls is None else str(choice.chosen_calls)
    notes = (calls, _note(choice.site, coords), _roi_note(choice.site))
    return PlanRow(choice, _cost(choice, coords), _joined(*notes))


def _cost(choice: Choice, coords: Coordinates) -> Cost:
    geometry, calls = choice.site.geometry, choice.site.calls
    if not choice.chosen or geometry is None:
        return Cost()
    try:
        names = coords.channel_names(geometry.ndim)  # checks that window and axes fit, too
    except CoordinatesError as error:
        raise CoordinatesError(f"{choice.site.name}: {error}") from error
    parameters = math.prod(geometry.coord_weight_shape(len(names)))
    if calls is None:
        return Cost(parameters)
    if choice.chosen_calls is not None:
        calls = tuple(calls[index] for index in choice.chosen_calls.indices)
    # Each weight is used once per output pixel; of a transposed convolution per input pixel.
    sizes = [call.input_size if geometry.transposed else call.output_size for call in calls]
    return Cost(parameters, parameters * sum(map(math.prod, sizes)))


def _note(site: Site, coords: Coordinates) -> str:
    if site.calls is None:
        return ""
    if not site.calls:
        return "never called on the example inputs"
    if all(math.prod(call.input_size) == 1 for call in site.calls):
        zero = _are_zero(coords, len(site.calls[0].input_size))
        return "its input is one pixel" + (", whose coordinates are 0" if zero else "")
    return ""


def _roi_note(site: Site) -> str:
    if not site.roi_operator:
        return ""
    name = site.roi_operator
    return f"its coordinates are those of a region of interest ({name}), not of the picture"


def _are_zero(coords: Coordinates, ndim: int) -> bool:
    """Whether every coordinate of one pixel is 0."""
    try:
        return not coords.shared_grid((1,) * ndim).any()
    except CoordinatesError:  # they do not fit, which matters where the site is chosen
        return False
