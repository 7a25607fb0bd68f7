"""Expand coordinates to the batch before they are convolved.

Where coordinates are computed from an input's size, one picture of them serves the whole batch, and
the sum with the convolution broadcasts it::

    Conv(x) + Conv(c)    ->    Conv(x) + Conv(Expand(c, batch of x))

ONNX broadcasts, and so does ONNX Runtime. OpenVINO fuses the sum into the convolution of the one
picture, and computes an output of another batch, without an error; OpenCV refuses the sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from coordconv_patch.export.graph_passes.refusals import RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import (
    is_addition,
    is_branch,
    store_integers_,
    values_without_inputs,
)

__all__ = ["ExpandCoordinates"]


class ExpandCoordinates(ir.passes.InPlacePass):
    """Gives every branch that is added to an activation the activation's batch.

    Only where the coordinates are one picture: those that are expanded already, or come from
    places, have a batch.
    """

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("expand_coordinates")
        independent = values_without_inputs(graph)
        for conv, activation in tuple(_unexpanded(graph, independent)):
            _expand_(graph, conv, activation)
            tally.count += 1
        if tally.count:
            graph.sort()
        return tally.result(model)


def _unexpanded(graph: ir.Graph, independent: set[ir.Value]) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Convolutions of one picture of coordinates, with an activation that each is added to."""
    for node in graph:
        if not is_addition(node):
            continue
        for branch, activation in (node.inputs, node.inputs[::-1]):
            assert branch is not None
            conv = branch.producer()
            if conv is None or activation is None or activation in independent:
                continue
            is_expanded = _is_one_picture(activation) or not _is_one_picture(conv.inputs[0])
            if is_branch(branch, independent) and not is_expanded:
                yield conv, activation
                break


def _is_one_picture(value: ir.Value | None) -> bool:
    """Whether coordinates, or an activation, have a batch of one, as the graph says."""
    shape = value.shape if value is not None else None
    return shape is not None and len(shape) > 2 and shape[0] == 1


def _expand_(graph: ir.Graph, conv: ir.Node, activation: ir.Value) -> None:
    coordinates = conv.inputs[0]
    assert coordinates is not None
    assert coordinates.shape is not None
    # Sizes in front of the ones are kept by Expand, so the batch alone has to be read.
    shape = ir.node("Shape", [activation])
    first = store_integers_(graph, f"{conv.name}_first", [0])
    batch = ir.node("Gather", [shape.outputs[0], first], {"axis": 0})
    rest = store_integers_(graph, f"{conv.name}_rest", [1] * (len(coordinates.shape) - 1))
    size = ir.node("Concat", [batch.outputs[0], rest], {"axis": 0})
    expanded = ir.node("Expand", [coordinates, size.outputs[0]])
    expanded.outputs[0].type = coordinates.type
    samples = activation.shape[0] if activation.shape is not None else None
    expanded.outputs[0].shape = ir.Shape([samples, *coordinates.shape[1:]])
    conv.replace_input_with(0, expanded.outputs[0])
    conv.outputs[0].shape = None  # its batch is another one now
    graph.insert_before(conv, [shape, batch, size, expanded])
