"""Read each dynamic length from the graph's inputs, once.

torch's TorchScript exporter reads the batch anew at every convolution, from what that reads::

    Gather(Shape(x), 0)

Where shape inference says that this length of x is a fixed number, or that of an input's axis, it
is stored, or read there. What is left are equal nodes, which onnx-ir makes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from coordconv_patch.export.graph_passes.refusals import RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import store_integers_, stored_tensor

__all__ = ["ReadSizesOnce"]


class ReadSizesOnce(ir.passes.InPlacePass):
    """Replaces the lengths of activations by numbers and by the lengths of inputs."""

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("read_sizes_once")
        for node in graph:  # what was inferred before nodes were folded says less
            for value in node.outputs:
                value.shape = value.shape if value.is_graph_output() else None
        ShapeInferencePass()(model)
        lengths = _Lengths(graph)
        for node in tuple(graph):
            reading = lengths.reading_of(node)
            known = lengths.value_of(reading) if reading is not None else None
            if known not in (None, node.outputs[0]) and node.outputs[0].uses():
                node.outputs[0].replace_all_uses_with(known)
                tally.count += 1
        graph.sort()
        return tally.result(model)


@dataclass(frozen=True)
class _Reading:
    """A length, or the name of one, that a node reads; as a scalar, or as a vector of one."""

    length: int | str
    rank: int


class _Lengths:
    """Values that hold one length each: a number, or that of an input's axis."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._values: dict[_Reading, ir.Value] = {}
        inputs = [value for value in graph.inputs if not value.is_initializer()]
        self._axes = {
            dim.value: (value, axis)
            for value in reversed(inputs)
            for axis, dim in enumerate(value.shape or ())
            if isinstance(dim, ir.SymbolicDim) and dim.value
        }
        self._same = dict(_resized_by_one(graph))
        for node in graph:  # what is read from an input stays
            reading = self.reading_of(node)
            if reading is not None and isinstance(reading.length, str) and _source(node) in inputs:
                self._values.setdefault(reading, node.outputs[0])

    def reading_of(self, node: ir.Node) -> _Reading | None:
        """The one length that a node reads from a value's shape, as shape inference tells it."""
        source = _source(node)
        index = stored_tensor(node.inputs[1]) if source is not None else None
        if source is None or source.shape is None or index is None or index.size != 1:
            return None
        dim = source.shape[int(index.numpy().item())]
        length = dim.value if isinstance(dim, ir.SymbolicDim) else dim
        while isinstance(length, str) and length in self._same:
            length = self._same[length]
        return None if length is None else _Reading(length, len(index.shape))

    def value_of(self, reading: _Reading) -> ir.Value | None:
        """A value that holds a length; ``None`` where it is not known to be that of an axis."""
        if isinstance(reading.length, str) and reading.length not in self._axes:
            return None
        if reading not in self._values:
            self._values[reading] = (
                self._stored(reading.length, reading.rank)
                if isinstance(reading.length, int)
                else self._read(*self._axes[reading.length], reading.rank)
            )
        return self._values[reading]

    def _read(self, source: ir.Value, axis: int, rank: int) -> ir.Value:
        shape = ir.node("Shape", [source])
        length = ir.node("Gather", [shape.outputs[0], self._stored(axis, rank)], {"axis": 0})
        length.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        length.outputs[0].shape = ir.Shape([1] * rank)
        self._graph.insert_before(self._graph[0], [shape, length])
        return length.outputs[0]

    def _stored(self, number: int, rank: int) -> ir.Value:
        name = f"{'lengths' if rank else 'length'}_{number}"
        if name not in self._graph.initializers:
            store_integers_(self._graph, name, [number] if rank else number)
        return self._graph.initializers[name]


def _source(node: ir.Node) -> ir.Value | None:
    """The value whose shape a node reads from, if it does."""
    shape = node.inputs[0] if node.op_type == "Gather" and node.domain == "" else None
    producer = shape.producer() if shape is not None else None
    if producer is None or producer.op_type != "Shape" or producer.attributes:
        return None
    return producer.inputs[0]


def _resized_by_one(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """Pairs of names of one length: shape inference gives every axis behind a Resize a new one."""
    for node in graph:
        if node.op_type == "Resize" and len(node.inputs) > 2:
            source, scales = node.inputs[0], stored_tensor(node.inputs[2])
            result = node.outputs[0].shape
            if source is None or source.shape is None or scales is None or result is None:
                continue
            for scale, before, after in zip(scales.numpy(), source.shape, result, strict=False):
                names = [dim.value for dim in (after, before) if isinstance(dim, ir.SymbolicDim)]
                if scale == 1 and len(names) == 2 and None not in names and names[0] != names[1]:
                    yield str(names[0]), str(names[1])
