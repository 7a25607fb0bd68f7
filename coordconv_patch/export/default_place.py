"""What a graph with places takes samples for that it is told no place of: whole pictures."""

from __future__ import annotations

import onnx_ir
import torch

from coordconv_patch.export.graph_passes.vocabulary import mark_as_coordinates_, store_integers_
from coordconv_patch.patching.placed_model import PLACES

__all__ = ["give_default_place_"]


def give_default_place_(model: onnx_ir.Model, ndim: int) -> None:
    """Give the places a default, and let one place be for all samples, in place.

    Runtimes fuse sums on the word of the axes' names, so the one place is expanded to the
    batch where it enters the graph.

    Args:
        model: A graph whose last input is the places.
        ndim: Their number of dimensions d.
    """
    graph = model.graph
    places = next(value for value in graph.inputs if value.name == PLACES)
    assert places.shape is not None
    samples = places.shape[0]
    readers = list(places.uses())
    if isinstance(samples, int):
        target, nodes = store_integers_(graph, f"{PLACES}_shape", [samples, ndim, ndim + 1]), []
    else:
        images = next(value for value in graph.inputs if value.shape and value.shape[0] == samples)
        batch = onnx_ir.node("Shape", [images], {"start": 0, "end": 1})
        rest = store_integers_(graph, f"{PLACES}_rest", [ndim, ndim + 1])
        shape = onnx_ir.node("Concat", [batch.outputs[0], rest], {"axis": 0})
        target, nodes = shape.outputs[0], [batch, shape]
    expanded = onnx_ir.node("Expand", [places, target])
    output = expanded.outputs[0]
    output.type, output.shape = places.type, places.shape
    nodes.append(expanded)
    for node, index in readers:
        node.replace_input_with(index, output)
    graph.insert_before(graph[0], nodes)
    places.shape = onnx_ir.Shape([PLACES, ndim, ndim + 1])
    places.const_value = onnx_ir.Tensor(torch.eye(ndim, ndim + 1).unsqueeze(0).numpy(), name=PLACES)
    graph.register_initializer(places)
    mark_as_coordinates_(places)
