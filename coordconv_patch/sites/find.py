"""The sites of a model: every place where a convolution is applied.

Convolution modules are found in the module tree, functional convolutions in graphs and in a
forward pass. The graphs tell the order of execution; a recorded forward pass on example
inputs, where given, tells order and sizes for any model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import fx, nn

from coordconv_patch.arguments import check_example_inputs
from coordconv_patch.running.inputs import check_is_module
from coordconv_patch.sites.graph_functions import graph_function_sites
from coordconv_patch.sites.modules import module_sites
from coordconv_patch.sites.obstacles import foreign_sites
from coordconv_patch.sites.order import execution_order
from coordconv_patch.sites.owned_functions import recorded_function_sites, traced_function_sites
from coordconv_patch.sites.regions import Regions, trace_regions
from coordconv_patch.sites.roi_graph_flow import traced_roi_sites
from coordconv_patch.sites.run_record import RunRecord, record_run
from coordconv_patch.sites.site import (
    ForeignSite,
    GraphFunctionSite,
    ModuleSite,
    OwnedFunctionSite,
    Site,
    SiteMap,
)

__all__ = ["find_sites", "function_sites"]


def find_sites(model: nn.Module, example_inputs: Any = None) -> SiteMap:
    """Find every convolution of a model. The model is not changed.

    Args:
        model: Any module, GraphModules included.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is
            keyword arguments). With it, the model is run on it once, in evaluation
            mode and without gradients; training flags and random state are restored.

    Raises:
        ArgumentError: If the model is not a module, or example inputs cannot be such.
        PatchError: If the forward pass fails on the example inputs.
    """
    check_is_module(model)
    check_example_inputs(example_inputs)
    regions = trace_regions(model)
    functions = function_sites(model, regions)
    sites: list[Site] = [*module_sites(model, regions), *foreign_sites(model), *functions]
    if example_inputs is None or isinstance(model, torch.jit.ScriptModule):
        order = execution_order(regions, functions)
        behind = traced_roi_sites(regions, functions)
        sites = [replace(site, roi_operator=behind.get(site.name, "")) for site in sites]
    else:
        modules = {site.name: site.module for site in sites if isinstance(site, ModuleSite)}
        in_graphs = [site for site in sites if isinstance(site, GraphFunctionSite)]
        record = record_run(model, example_inputs, modules, in_graphs)
        sites = _as_recorded(model, regions, sites, record)
        order = list(record.calls)
    return SiteMap(
        sites=tuple(sites if order is None else _in_order(sites, order)),
        regions=tuple(regions.by_name.values()),
        order_known=order is not None,
        untraced=regions.untraced,
        model=model,
    )


def function_sites(
    model: nn.Module, regions: Regions
) -> tuple[GraphFunctionSite | OwnedFunctionSite, ...]:
    """The functional convolutions in the traced graphs; calls by one weight are one site."""
    return tuple(
        site
        for region in regions.by_name.values()
        for site in (
            graph_function_sites(region)
            if isinstance(region.module, fx.GraphModule)
            else traced_function_sites(model, region)
        )
    )


def _as_recorded(
    model: nn.Module, regions: Regions, sites: Iterable[Site], record: RunRecord
) -> list[Site]:
    """The sites with the calls of a forward pass, and those that only it has shown."""
    # What ran is the truth: a trace may take another way through the code.
    taken = _attributes_with_coordinates(model, sites)
    ran = {
        site.name: site
        for site in recorded_function_sites(model, regions, record.functions)
        if site.owned.weight is not None or id(site.weight) not in taken
    }
    guessed = _guessed(model, sites, ran)
    kept = [
        _not_run(site) if _has_computed_weight(site) else site
        for site in sites
        if site.name not in ran and site.name not in guessed
    ]
    return [
        # The calls of foreign convolutions cannot be watched.
        site
        if isinstance(site, ForeignSite)
        else replace(
            site,
            calls=tuple(record.calls.get(site.name, ())),
            caller=record.callers.get(site.name),
            roi_operator=record.roi_operators.get(site.name, ""),
        )
        for site in (*kept, *ran.values())
    ]


def _has_computed_weight(site: Site) -> TypeGuard[OwnedFunctionSite]:
    """Whether a site has no coordinates yet, and a weight that is computed in the forward pass."""
    return isinstance(site, OwnedFunctionSite) and not site.patched and site.owned.weight is None


def _not_run(site: OwnedFunctionSite) -> OwnedFunctionSite:
    """The same site, of which a run on the example inputs has shown nothing."""
    obstacle = (
        "its weight is computed when the model runs, and in evaluation mode, on the example "
        "inputs, it does not run, so its shape is not known"
    )
    return replace(site, obstacle=obstacle)


def _attributes_with_coordinates(model: nn.Module, sites: Iterable[Site]) -> set[int]:
    """The identities of stored weights that have coordinates, as mere attributes too."""
    return {
        id(operator.attrgetter(site.owned.weight)(model.get_submodule(site.owned.owner)))
        for site in sites
        if isinstance(site, OwnedFunctionSite) and site.patched and site.owned.weight is not None
    }


def _guessed(model: nn.Module, sites: Iterable[Site], ran: Mapping[str, Site]) -> set[str]:
    """Names of the sites that a trace guesses at and a run has shown by another name.

    A trace of a module that is called twice has two calls by a computed weight, which are one
    site. And it takes a tensor that a module keeps as a mere attribute for a stored weight, where
    other code may compute it anew before each forward (``torch.nn.utils.prune``).
    """
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    computed = {
        (site.owned.owner, site.owned.function)
        for site in ran.values()
        if isinstance(site, OwnedFunctionSite) and site.owned.weight is None
    }
    return {
        site.name
        for site in sites
        if isinstance(site, OwnedFunctionSite)
        and not site.patched
        and (site.owned.weight is None or id(site.weight) not in registered)
        and (site.owned.owner, site.owned.function) in computed
    }


def _in_order(sites: Sequence[Site], order: Sequence[str]) -> list[Site]:
    """Sites by their first execution, those that are never executed last."""
    position = {name: index for index, name in reversed(list(enumerate(order)))}
    placed = [replace(site, order=position.get(site.name)) for site in sites]
    return sorted(placed, key=lambda site: len(position) if site.order is None else site.order)
