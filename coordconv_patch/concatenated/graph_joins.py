"""Concatenations that are taken out of the graph of a GraphModule, which has no other code."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import fx

from coordconv_patch.concatenated.joins import CATS, Join, cat_arguments

__all__ = ["leave_out_of_graph_"]


def leave_out_of_graph_(module: fx.GraphModule, joins: Sequence[Join]) -> None:
    """Let a graph's concatenations give the image alone; what makes the coordinates goes too.

    Args:
        module: The GraphModule.
        joins: Which, by their positions among the graph's own concatenations.
    """
    graph = copy.deepcopy(module.graph)
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target in CATS]
    for join in joins:
        for position in join.positions:
            node = nodes[position]
            parts, dim = cat_arguments(node.args, node.kwargs)
            kept = list(parts[join.kept[0] : join.kept[1]])
            with graph.inserting_before(node):
                rest = kept[0] if len(kept) == 1 else graph.call_function(torch.cat, (kept, dim))
            node.replace_all_uses_with(rest)
            graph.erase_node(node)
    graph.lint()
    module.graph = graph  # which must be in place to ask modules for side effects
    graph.eliminate_dead_code()
    module.recompile()
