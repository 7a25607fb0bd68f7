"""Region-of-interest operators in graphs: the convolutions behind them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

from torch import fx
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.graphs.functional import conv_arguments, join_names
from coordconv_patch.running.inputs import tensors_in
from coordconv_patch.sites.regions import Region, Regions
from coordconv_patch.sites.roi_operators import roi_operator, writes_in_place
from coordconv_patch.sites.site import GraphFunctionSite, OwnedFunctionSite

__all__ = ["traced_roi_sites"]

_TELL_SIZES = frozenset({"size", "dim", "numel", "stride", "shape", "ndim", "dtype", "device"})
"""What a trace may ask of a tensor that carries none of its features on."""


def traced_roi_sites(
    regions: Regions, functions: Iterable[GraphFunctionSite | OwnedFunctionSite]
) -> dict[str, str]:
    """The sites behind region-of-interest operators, as far as graphs tell it.

    Args:
        regions: The traced regions of a model.
        functions: The functional sites in them.

    Returns:
        The operator for each of these sites, by site name.
    """
    flow = _GraphFlow(regions, functions)
    for region in regions.by_name.values():
        flow.run(region, "")
    return flow.sites


class _GraphFlow:
    """As :class:`coordconv_patch.sites.roi_flow.RoiFlow`, through graphs."""

    def __init__(
        self, regions: Regions, functions: Iterable[GraphFunctionSite | OwnedFunctionSite]
    ) -> None:
        self._regions = regions
        self._by_node = {node: site.name for site in functions for node in site.nodes}
        self.sites: dict[str, str] = {}

    def run(self, region: Region, given: str) -> str:
        """Follow a region's graph.

        Args:
            region: The region.
            given: The operator that its inputs were computed behind; ``""``: behind none.

        Returns:
            The same of its output.
        """
        operators: dict[fx.Node, str] = {}
        result = ""
        for node in region.graph.nodes:
            name = given if node.op == "placeholder" else self._behind(region, node, operators)
            if not name:
                continue
            if node.op == "output":
                result = name
            elif _may_carry(node):
                operators[node] = name
                if _node_writes(node) and isinstance(node.args[0], fx.Node):
                    operators[node.args[0]] = name
        return result

    def _behind(self, region: Region, node: fx.Node, operators: Mapping[fx.Node, str]) -> str:
        if node.op == "call_function" and roi_operator(node.target):
            return roi_operator(node.target)
        name = next((operators[each] for each in node.all_input_nodes if each in operators), "")
        if node.op == "call_module":
            target = join_names(region.name, str(node.target))
            module = self._regions.modules[target]
            if isinstance(module, _ConvNd):
                self._note(self._regions.names[module][0], name)
            elif target in self._regions.by_name:
                return self.run(self._regions.by_name[target], name)
        elif node in self._by_node:
            source = conv_arguments(node)["input"]
            self._note(self._by_node[node], operators.get(source, ""))
        return name

    def _note(self, site: str, name: str) -> None:
        if name:
            self.sites.setdefault(site, name)


def _may_carry(node: fx.Node) -> bool:
    """Whether a node's value can be features: floating point numbers, as far as one knows."""
    value = node.meta.get("val")
    if value is not None:
        return any(tensor.is_floating_point() for tensor in tensors_in(value))
    if node.target is getattr:
        return node.args[1] not in _TELL_SIZES
    return node.op != "call_method" or node.target not in _TELL_SIZES


def _node_writes(node: fx.Node) -> bool:
    if node.target is operator.setitem:
        return True
    if node.op == "call_method":
        return writes_in_place(str(node.target), node.kwargs)
    name = str(getattr(node.target, "__name__", ""))
    return node.op == "call_function" and writes_in_place(name, node.kwargs)
