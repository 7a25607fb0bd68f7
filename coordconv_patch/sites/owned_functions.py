"""The functional convolutions that plain modules call in their own code."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.graphs.functional import (
    conv_arguments,
    function_input,
    is_function_site,
    join_names,
    stored_weight,
    weight_site_name,
)
from coordconv_patch.graphs.own_padding import NOT_PADDED
from coordconv_patch.layers.geometry import CONV_FUNCTIONS, ndim_of
from coordconv_patch.owners.call_owners import geometry_of_calls, owner_obstacle
from coordconv_patch.owners.function_log import FunctionSite, common_caller
from coordconv_patch.owners.owned_calls import OwnedCalls
from coordconv_patch.sites.graph_functions import common_geometry, function_name
from coordconv_patch.sites.regions import Region, Regions
from coordconv_patch.sites.site import OwnedFunctionSite

__all__ = ["recorded_function_sites", "traced_function_sites"]


def traced_function_sites(model: nn.Module, region: Region) -> Iterator[OwnedFunctionSite]:
    """The functional sites of a plain module, as a trace shows them."""
    by_weight: dict[Any, list[fx.Node]] = {}
    for node in filter(is_function_site, region.graph.nodes):
        key = stored_weight(node) or conv_arguments(node).get("weight")
        by_weight.setdefault(key, []).append(node)
    taken: Counter[str] = Counter()
    for weight, nodes in by_weight.items():
        if isinstance(weight, str):
            yield _site_by_stored_weight(model, region, weight, nodes)
        else:
            site = _site_by_computed_weight(model, region, nodes)
            count = taken[site.name]
            taken[site.name] += 1
            yield replace(site, name=f"{site.name}_{count}") if count else site


def recorded_function_sites(
    model: nn.Module, regions: Regions, functions: Sequence[FunctionSite]
) -> Iterator[OwnedFunctionSite]:
    """The functional sites of plain modules that were seen running."""
    for seen in functions:
        owner = model.get_submodule(seen.owned.owner)
        yield OwnedFunctionSite(
            name=seen.name,
            class_name=seen.owned.function,
            geometry=seen.geometry,
            padding=seen.owned.padding.rule,
            obstacle=seen.obstacle or owner_obstacle(owner, seen.owned.weight),
            patched=geometry_of_calls(owner, seen.owned) is not None,
            region=regions.around(join_names(seen.owned.owner, "?")),
            owned=seen.owned,
            weight=seen.weights[0],
        )


def _site_by_stored_weight(
    model: nn.Module, region: Region, weight: str, nodes: list[fx.Node]
) -> OwnedFunctionSite:
    stored = join_names(region.name, weight)
    holder = stored.rpartition(".")[0]
    owner_name = common_caller([_callers(region, node) for node in nodes], holder)
    owner = model.get_submodule(owner_name)
    function = function_name(nodes[0])
    geometry, padding, obstacle = common_geometry(region, nodes)
    own_padding = NOT_PADDED if obstacle else function_input(nodes[0]).own
    indices, total = _positions(region, nodes, weight)
    own_name = stored[len(owner_name) :].lstrip(".")
    owned = OwnedCalls(owner_name, function, own_name, own_padding, indices, total)
    return OwnedFunctionSite(
        name=weight_site_name(stored, model.get_submodule(holder)),
        class_name=function,
        geometry=geometry,
        padding=padding,
        obstacle=obstacle or owner_obstacle(owner, own_name),
        patched=geometry_of_calls(owner, owned) is not None,
        region=region,
        owned=owned,
        weight=operator.attrgetter(stored)(model),
        nodes=tuple(nodes),
    )


def _site_by_computed_weight(
    model: nn.Module, region: Region, nodes: list[fx.Node]
) -> OwnedFunctionSite:
    owner = common_caller([_callers(region, node) for node in nodes])
    function = function_name(nodes[0])
    owned = OwnedCalls(owner, function, None)
    geometry = geometry_of_calls(model.get_submodule(owner), owned)
    obstacle = (
        "its weight is computed when the model runs, so a trace does not tell its shape: pass "
        "example_inputs=..., on which it is seen"
    )
    return OwnedFunctionSite(
        name=join_names(owner, function),
        class_name=function,
        geometry=geometry,
        obstacle="" if geometry is not None else obstacle,
        patched=geometry is not None,
        region=region,
        owned=owned,
        weight=None,
        nodes=tuple(nodes),
    )


def _callers(region: Region, node: fx.Node) -> list[str]:
    """Qualified names of the modules that ran when a node was traced, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [region.name, *(join_names(region.name, path) for path, _ in stack.values())]


def _positions(
    region: Region, nodes: Sequence[fx.Node], weight: str
) -> tuple[tuple[int, ...] | None, int]:
    """Positions of a site's calls among those by its weight, and how many these are.

    A convolution module whose weight the code also uses by itself calls it too. ``None`` and 0
    where no other code gives the weight to the same function.
    """
    holder = region.module.get_submodule(weight.rpartition(".")[0])
    if not isinstance(holder, _ConvNd):
        return None, 0
    if CONV_FUNCTIONS[ndim_of(holder), holder.transposed] is not nodes[0].target:
        return None, 0
    alike = [
        node
        for node in region.graph.nodes
        if node in nodes
        or (node.op == "call_module" and region.module.get_submodule(node.target) is holder)
    ]
    if len(alike) == len(nodes):
        return None, 0
    return tuple(i for i, node in enumerate(alike) if node in nodes), len(alike)
