"""The functional convolutions of GraphModules, as their graphs show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, fx

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import (
    branch_of,
    function_geometry,
    function_input,
    function_nodes,
    has_exported_branch,
)
from coordconv_patch.layers.geometry import DECLARED, Call, ConvGeometry, Padding
from coordconv_patch.sites.regions import Region
from coordconv_patch.sites.site import GraphFunctionSite

__all__ = ["common_geometry", "function_name", "graph_function_sites"]


def graph_function_sites(region: Region) -> Iterator[GraphFunctionSite]:
    """The functional sites of a GraphModule; calls by one weight are one site."""
    root = region.module
    for name, nodes in function_nodes(region.name, root, region.graph).items():
        geometry, padding, obstacle = common_geometry(region, nodes)
        if hasattr(root, "train_graph"):
            obstacle = obstacle or "its graph module has two graphs, for training and evaluation"
        yield GraphFunctionSite(
            name=name,
            class_name=function_name(nodes[0]),
            geometry=geometry,
            padding=padding,
            obstacle=obstacle,
            patched=any(
                branch_of(root, node) is not None or has_exported_branch(root, node)
                for node in nodes
            ),
            calls=_calls_from_meta(nodes),
            region=region,
            nodes=tuple(nodes),
        )


def function_name(node: fx.Node) -> str:
    """Name of the function that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def common_geometry(
    region: Region, nodes: Sequence[fx.Node]
) -> tuple[ConvGeometry | None, Padding, str]:
    """What a site's nodes in a region's graph tell of its geometry: that, its padding, an obstacle.

    The geometry is ``None`` where the graph does not tell it.
    """
    try:
        geometries = [function_geometry(region.module, node) for node in nodes]
        paddings = [function_input(node).own.rule for node in nodes]
    except PatchError as error:
        return None, DECLARED, str(error)
    several = len(set(zip(geometries, paddings, strict=True))) > 1
    obstacle = "one weight is used with several strides or paddings" if several else ""
    return geometries[0], paddings[0], obstacle


def _calls_from_meta(nodes: Sequence[fx.Node]) -> tuple[Call, ...] | None:
    """Sizes that the graph itself knows (torch.export records them)."""
    calls = []
    for node in nodes:
        try:
            source = function_input(node).node
        except PatchError:
            return None
        values = [source.meta.get("val"), node.meta.get("val")]
        sizes = [tuple(value.shape[2:]) for value in values if isinstance(value, Tensor)]
        if len(sizes) < 2:
            return None
        if not all(type(length) is int for size in sizes for length in size):
            return None
        calls.append(Call(*sizes))
    return tuple(calls)
