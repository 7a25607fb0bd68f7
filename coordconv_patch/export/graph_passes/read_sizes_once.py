"""Read each dynamic size from the graph's inputs, once.

torch's TorchScript exporter reads the batch anew at every convolution, from what that reads, and
guards every expansion to it against the length -1, which means "as it is"::

    Where(Equal(t, -1), 1, t)  with  t = Concat(Gather(Shape(x), 0), C, H, W)

Lengths are not negative, so that is t. And where shape inference finds that a length of x is a
fixed number, or that of an input's axis, it is read there. What is left are equal nodes, which a
runtime, or onnx-ir, makes one.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from coordconv_patch.export.graph_passes.refusals import RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import stored_tensor

__all__ = ["ReadSizesOnce"]


class ReadSizesOnce(ir.passes.InPlacePass):
    """Replaces guarded lengths by lengths, and those of activations by those of inputs."""

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("read_sizes_once")
        for node in tuple(graph):
            if node.op_type == "Where" and (lengths := _unguarded(node)) is not None:
                node.outputs[0].replace_all_uses_with(lengths)
                tally.count += 1
        ShapeInferencePass()(model)
        sizes = _Sizes(graph)
        for node in tuple(graph):
            length = _length_read_by(node)
            known = sizes.value_of(length) if length is not None else None
            if known is not None and known is not node.outputs[0]:
                node.outputs[0].replace_all_uses_with(known)
                tally.count += 1
        graph.sort()
        return tally.result(model)


class _Sizes:
    """Values that hold one length each: a number, or that of an input's axis."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._values: dict[int | str, ir.Value] = {}
        self._axes = {
            dim.value: (value, axis)
            for value in reversed(graph.inputs)
            if not value.is_initializer()
            for axis, dim in enumerate(value.shape or ())
            if isinstance(dim, ir.SymbolicDim) and dim.value
        }

    def value_of(self, length: int | ir.SymbolicDim) -> ir.Value | None:
        """A scalar that holds a length; ``None`` where it is not known to be that of an axis."""
        key = length.value if isinstance(length, ir.SymbolicDim) else length
        if key is None or (isinstance(key, str) and key not in self._axes):
            return None
        if key not in self._values:
            self._values[key] = self._stored(key) if isinstance(key, int) else self._read(key)
        return self._values[key]

    def _read(self, name: str) -> ir.Value:
        value, axis = self._axes[name]
        shape = ir.node("Shape", [value])
        length = ir.node("Gather", [shape.outputs[0], self._stored(axis)], {"axis": 0})
        length.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        length.outputs[0].shape = ir.Shape([])
        self._graph.insert_before(self._graph[0], [shape, length])
        return length.outputs[0]

    def _stored(self, number: int) -> ir.Value:
        value = ir.Value(
            name=f"length_{number}",
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([]),
            const_value=ir.tensor(number, dtype=ir.DataType.INT64, name=f"length_{number}"),
        )
        if value.name in self._graph.initializers:
            return self._graph.initializers[value.name]
        self._graph.register_initializer(value)
        return value


def _length_read_by(node: ir.Node) -> int | ir.SymbolicDim | None:
    """The length that a node reads, one, from the shape of a value; as shape inference tells it."""
    if node.op_type != "Gather" or node.domain != "":
        return None
    shape, index = node.inputs[0], stored_tensor(node.inputs[1])
    producer = shape.producer() if shape is not None else None
    if producer is None or producer.op_type != "Shape" or producer.attributes or index is None:
        return None
    source = producer.inputs[0]
    if source is None or source.shape is None or index.shape.rank() != 0:
        return None
    return source.shape[int(index.numpy())]


def _unguarded(where: ir.Node) -> ir.Value | None:
    """The lengths that a Where guards against -1, if they cannot be negative."""
    equal = where.inputs[0].producer() if where.inputs[0] is not None else None
    lengths = where.inputs[2]
    if equal is None or equal.op_type != "Equal" or lengths is None:
        return None
    if lengths not in equal.inputs or not _are_lengths(lengths):
        return None
    other = equal.inputs[1] if equal.inputs[0] is lengths else equal.inputs[0]
    return _before_flattening(lengths) if _is_negative(other) else None


def _before_flattening(lengths: ir.Value) -> ir.Value:
    """Lengths as they were joined: what is joined is flat, and inference sees through that."""
    node = lengths.producer()
    if node is not None and node.op_type == "Reshape":
        joined, shape = node.inputs[0], stored_tensor(node.inputs[1])
        before = joined.producer() if joined is not None else None
        is_flat = shape is not None and shape.numpy().tolist() == [-1]
        if before is not None and before.op_type == "Concat" and is_flat:
            return before.outputs[0]
    return lengths


def _are_lengths(value: ir.Value | None) -> bool:
    """Whether a value is made of lengths that shapes have, and of stored ones."""
    stored = stored_tensor(value)
    if stored is not None:
        return stored.dtype is ir.DataType.INT64 and bool((stored.numpy() >= 0).all())
    node = value.producer() if value is not None else None
    if node is None:
        return False
    if node.op_type == "Concat":
        return all(_are_lengths(part) for part in node.inputs)
    if node.op_type in ("Reshape", "Unsqueeze", "Gather"):
        return _are_lengths(node.inputs[0])
    return node.op_type == "Shape"


def _is_negative(value: ir.Value | None) -> bool:
    """Whether a value is stored numbers below zero, or a fill of one times such numbers."""
    stored = stored_tensor(value)
    if stored is not None:
        return bool((stored.numpy() < 0).all())
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Mul":
        return False
    return any(
        _is_filled_with_one(one) and _is_negative(other)
        for one, other in (node.inputs, node.inputs[::-1])
    )


def _is_filled_with_one(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "ConstantOfShape" or "value" not in node.attributes:
        return False
    return bool((node.attributes["value"].as_tensor().numpy() == 1).all())
