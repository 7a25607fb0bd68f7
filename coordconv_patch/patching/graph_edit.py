"""Branches in the graph of a GraphModule: conv(x, W) becomes conv(x, W) + branch(x), and back."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import cast

from torch import fx, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import (
    branch_of,
    conv_arguments,
    function_input,
    function_nodes,
)
from coordconv_patch.layers.branch import CoordBranch, branch_name
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.patching.plan_row import PlanRow

__all__ = ["GraphEdit", "remove_branches_", "rows_by_graph"]


def rows_by_graph(rows: Iterable[PlanRow]) -> dict[str, list[PlanRow]]:
    """Sites in graphs, by the qualified name of the GraphModule whose graph is to be edited."""
    graphs: dict[str, list[PlanRow]] = {}
    for row in rows:
        assert row.site.region is not None
        graphs.setdefault(row.site.region.name, []).append(row)
    return graphs


class GraphEdit:
    """Branches added to the functional convolutions of a GraphModule; prepared, then committed."""

    def __init__(
        self, model: nn.Module, owner: str, rows: list[PlanRow], coords: Coordinates
    ) -> None:
        self.owner = owner
        self.target = cast(fx.GraphModule, model.get_submodule(owner))
        self.added: dict[str, nn.Module] = {}
        self.graph = copy.deepcopy(self.target.graph)
        nodes_by_site = function_nodes(owner, self.target, self.graph)
        for row in rows:
            name = row.site.name
            if name not in nodes_by_site:
                raise PatchError(f"{name}: not found when {owner or 'the model'} is traced")
            self._add_branch(row, nodes_by_site[name], coords)
        self.graph.lint()

    def _add_branch(self, row: PlanRow, nodes: list[fx.Node], coords: Coordinates) -> None:
        site = row.site
        assert site.geometry is not None
        name = branch_name(self.target, site.name[len(self.owner) :].lstrip("."))
        weight = conv_arguments(nodes[0])["weight"]
        if weight.op == "get_attr":
            tensor = operator.attrgetter(str(weight.target))(self.target)
        else:
            tensor = weight.meta["val"]
        added = self.added[name] = CoordBranch(
            site.geometry,
            coords,
            padding=site.padding,
            device=tensor.device,
            dtype=tensor.dtype,
        )
        if row.choice.chosen_calls is not None:
            added.chosen_calls = row.choice.chosen_calls
            nodes = [nodes[index] for index in row.choice.chosen_calls.indices]
        for node in nodes:
            with self.graph.inserting_after(node):
                branch = self.graph.call_module(name, (function_input(node).node,))
            with self.graph.inserting_after(branch):
                total = self.graph.call_function(operator.add)
            total.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
            node.replace_all_uses_with(total)
            total.args = (node, branch)

    def commit(self) -> None:
        """Put the edited graph in place."""
        for name, module in self.added.items():
            self.target.add_submodule(name, module)
        self.target.graph = self.graph


def remove_branches_(graph_module: fx.GraphModule) -> None:
    """Take every branch out of a graph again; the graph is replaced, as by :class:`GraphEdit`."""
    branches: set[str] = set()
    graph = copy.deepcopy(graph_module.graph)
    for nodes in function_nodes("", graph_module, graph).values():
        for node in nodes:
            pair = branch_of(graph_module, node)
            if pair is None:
                continue
            total, branch = pair
            total.replace_all_uses_with(node)
            graph.erase_node(total)
            graph.erase_node(branch)
            branches.add(str(branch.target))
    for name in branches:
        graph_module.delete_submodule(name)
    if branches:
        graph_module.graph = graph
