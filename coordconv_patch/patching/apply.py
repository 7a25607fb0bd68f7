"""The plan carried out on a model. Everything that can fail is done before the first change."""

from __future__ import annotations

import dataclasses
from typing import cast

from torch import nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.folding.other_libraries import guard_folding_
from coordconv_patch.followers.follow import renew_followers_
from coordconv_patch.layers.call_hooks import add_to_calls_
from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.layers.conversion import convert_
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.left_behind.watch import watch_
from coordconv_patch.owners.call_owners import add_to_owner_
from coordconv_patch.owners.owned_calls import OwnedCalls
from coordconv_patch.patching.graph_edit import GraphEdit, rows_by_graph
from coordconv_patch.patching.plan import Plan
from coordconv_patch.patching.plan_row import PlanRow
from coordconv_patch.running.rollback import unchanged_on_failure
from coordconv_patch.running.wrappers import check_not_wrapped
from coordconv_patch.sites.site import GraphFunctionSite, OwnedFunctionSite

__all__ = ["apply_plan_"]


def apply_plan_(model: nn.Module, decided: Plan) -> nn.Module:
    """Carry a plan out on a model, in place; on the model that was planned, or on a copy of it.

    Returns:
        The model itself.

    Raises:
        PatchError: If a chosen site cannot be patched. The model is unchanged then.
    """
    check_not_wrapped(model)
    chosen = [row for row in decided.rows if row.chosen]
    in_graphs = [row for row in chosen if isinstance(row.site, GraphFunctionSite)]
    by_graph = rows_by_graph(in_graphs)
    edits = [GraphEdit(model, name, rows, decided.coords) for name, rows in by_graph.items()]
    with unchanged_on_failure(model):
        for row in chosen:
            if not isinstance(row.site, GraphFunctionSite):
                _patch_module_(model, row, decided.coords)
        for edit in edits:
            edit.commit()
        renew_followers_(model)
        guard_folding_(model)
        watch_(model)
    return model


def _patch_module_(model: nn.Module, row: PlanRow, coords: Coordinates) -> None:
    """Patch one site that is not in a graph."""
    site, chosen_calls = row.site, row.choice.chosen_calls
    if isinstance(site, OwnedFunctionSite):
        assert site.geometry is not None
        assert site.weight is not None
        owned = site.owned if chosen_calls is None else _narrowed(site.owned, chosen_calls)
        add_to_owner_(model, site.name, owned, site.geometry, coords, site.weight, chosen_calls)
    elif chosen_calls is None:
        convert_(cast(_ConvNd, model.get_submodule(site.name)), coords, site.padding)
    else:
        add_to_calls_(model, site.name, chosen_calls, coords, site.padding)


def _narrowed(owned: OwnedCalls, chosen: ChosenCalls) -> OwnedCalls:
    """Some of a functional site's calls alone; calls that a file names are those already."""
    if owned.indices is not None and len(owned.indices) != chosen.total:
        return owned
    positions = owned.indices or tuple(range(chosen.total))
    indices = tuple(positions[index] for index in chosen.indices)
    return dataclasses.replace(owned, indices=indices, total=owned.total or chosen.total)
