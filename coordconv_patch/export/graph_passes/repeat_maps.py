"""Repeat a coordinate map for every image of a fixed batch.

One map serves the whole batch, and the sum with the convolution broadcasts it::

    Conv(x) + map    ->    Conv(x) + Expand(map, batch of x)

which is stored whole where the target stores constants whole. onnx2tf turns a graph's images to
(N, H, W, C), and takes an operand that broadcasts for one of another order wherever two of its
lengths are alike; one of the activation's own shape it turns with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from coordconv_patch.export.graph_passes.refusals import RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import (
    is_addition,
    store_integers_,
    values_without_inputs,
)

__all__ = ["RepeatMaps"]


class RepeatMaps(ir.passes.InPlacePass):
    """Gives every map that is added to a convolution's output the batch of that output."""

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("repeat_maps")
        for addition, coordinates, batch in tuple(_broadcast(graph)):
            sizes = [batch, *[1] * (len(coordinates.shape or ()) - 1)]
            target = store_integers_(graph, f"{addition.name}_batch", sizes)
            repeated = ir.node("Expand", [coordinates, target])
            graph.insert_before(addition, [repeated])
            for index, value in enumerate(addition.inputs):
                if value is coordinates:
                    addition.replace_input_with(index, repeated.outputs[0])
            tally.count += 1
        return tally.result(model)


def _broadcast(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, int]]:
    """Sums of a convolution and a map of one picture; the map, and the convolution's batch."""
    independent = values_without_inputs(graph)
    for node in graph:
        if not is_addition(node):
            continue
        for coordinates, output in (node.inputs, node.inputs[::-1]):
            if coordinates is None or output is None or coordinates not in independent:
                continue
            conv, shape, own = output.producer(), output.shape, coordinates.shape
            if conv is None or conv.op_type not in ("Conv", "ConvTranspose") or shape is None:
                continue
            batch = shape[0]
            is_one = own is not None and len(own) == len(shape) and own[0] == 1
            if is_one and isinstance(batch, int) and batch > 1:
                yield node, coordinates, batch
                break
