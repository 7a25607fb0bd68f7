"""Drop what torch notes of the origin of nodes that coordinates added to a graph.

That is a stack trace and the convolution's place in the model, which the plain convolution
beside has too: most of what coordinates would add to a small network's file.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import onnx_ir as ir

from coordconv_patch.export.graph_passes.refusals import RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import (
    coordinate_nodes,
    is_addition,
    is_read_once,
)
from coordconv_patch.layers.coordconv import CoordConvNd

__all__ = ["ForgetOrigins"]


class ForgetOrigins(ir.passes.InPlacePass):
    """Clears the metadata of coordinate nodes, of their additions, and of their weights."""

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("forget_origins")
        of_coordinates = set(coordinate_nodes(graph))
        for node in graph:
            if node in of_coordinates or _is_addition_of_a_branch(node):
                for notes in _notes_of(node):
                    tally.count += bool(notes)
                    notes.clear()
        return tally.result(model)


def _notes_of(node: ir.Node) -> Iterator[MutableMapping[str, str]]:
    """What is noted of a node, and of the initializers that it alone reads."""
    yield node.metadata_props
    for value in node.inputs:
        if value is not None and value.is_initializer() and is_read_once(value):
            yield value.metadata_props


def _is_addition_of_a_branch(node: ir.Node) -> bool:
    """Whether a patched layer's forward made the node; the residual additions are the model's."""
    modules = node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "")
    return is_addition(node) and f"{CoordConvNd.__module__}." in modules
