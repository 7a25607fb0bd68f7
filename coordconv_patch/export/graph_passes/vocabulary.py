"""What passes ask of a graph: which values are coordinates, who reads a value, what is stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

__all__ = [
    "coordinate_bytes",
    "coordinate_growth",
    "coordinate_nodes",
    "coordinate_sum",
    "holds_coordinates",
    "is_addition",
    "is_branch",
    "is_own_weight",
    "is_read_once",
    "mark_as_coordinates_",
    "store_",
    "store_integers_",
    "stored_numbers",
    "stored_tensor",
    "values_without_inputs",
]


_COORDINATES = "coordconv_patch.coordinates"
"""Of an initializer's ``meta``, which no file has."""


def mark_as_coordinates_(value: ir.Value) -> None:
    """Note that an initializer holds coordinates or places, also for :func:`coordinate_bytes`."""
    value.meta[_COORDINATES] = True


def holds_coordinates(value: ir.Value | None) -> bool:
    """Whether :func:`mark_as_coordinates_` has noted so."""
    return value is not None and _COORDINATES in value.meta


def coordinate_bytes(graph: ir.Graph) -> int:
    """Bytes of the initializers that hold coordinates."""
    return sum(
        value.const_value.nbytes
        for value in graph.initializers.values()
        if _COORDINATES in value.meta and value.const_value is not None
    )


def coordinate_growth(graph: ir.Graph) -> int:
    """Bytes of the initializers that are there for coordinates: constants, and their own weights.

    A weight that a convolution has for its input and for coordinates (the lowering ``"channels"``,
    coordinates that an activation takes along) is not counted.
    """
    marked = {value for value in graph.initializers.values() if _COORDINATES in value.meta}
    read = {value for node in coordinate_nodes(graph) for value in node.inputs if value is not None}
    stored = (value.const_value for value in marked | {v for v in read if v.is_initializer()})
    return sum(tensor.nbytes for tensor in stored if tensor is not None)


def values_without_inputs(graph: ir.Graph) -> set[ir.Value]:
    """The values that depend on places and on the sizes of the graph's inputs, but on no image."""
    images = {value for value in graph.inputs if _COORDINATES not in value.meta}
    independent = {*graph.initializers.values(), *graph.inputs} - images
    for node in graph:
        reads_sizes = node.op_type in ("Shape", "Size")
        if reads_sizes or all(v is None or v in independent for v in node.inputs):
            independent.update(node.outputs)
    return independent


def coordinate_nodes(graph: ir.Graph) -> tuple[ir.Node, ...]:
    """The convolutions of coordinates, and the nodes that lead to them."""
    independent = values_without_inputs(graph)
    nodes: dict[ir.Node, None] = {}
    pending = [node for node in graph if node.op_type == "Conv" and node.inputs[0] in independent]
    while pending:
        node = pending.pop()
        if node not in nodes and node.outputs[0] in independent:
            nodes[node] = None
            before = [value.producer() for value in node.inputs if value is not None]
            pending += [producer for producer in before if producer is not None]
    return tuple(nodes)


def is_branch(value: ir.Value, independent: set[ir.Value]) -> bool:
    """Whether a value is a convolution of coordinates that one node alone reads.

    ``independent`` is what :func:`values_without_inputs` gives, here and below.
    """
    producer = value.producer()
    return (
        producer is not None
        and producer.op_type == "Conv"
        and producer.inputs[0] in independent
        and len(value.uses()) == 1
    )


def is_addition(node: ir.Node | None) -> bool:
    """Whether a node is ONNX's own ``Add``."""
    return node is not None and node.op_type == "Add" and node.domain == ""


def coordinate_sum(value: ir.Value | None, independent: set[ir.Value]) -> ir.Node | None:
    """The addition of a coordinate branch that a value is the result of, if it is one."""
    addition = value.producer() if value is not None else None
    if addition is None or not is_addition(addition):
        return None
    terms = [term for term in addition.inputs if term is not None]
    return addition if any(is_branch(term, independent) for term in terms) else None


def is_read_once(value: ir.Value) -> bool:
    """Whether one node alone reads a value, and the graph does not put it out."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def is_own_weight(value: ir.Value | None) -> bool:
    """Whether a value is a float32 initializer that one node alone reads, so that it may change.

    A value that a Constant node holds is not: its numbers stand in the node.
    """
    if value is None:
        return False
    tensor = value.const_value
    return (
        tensor is not None
        and tensor.dtype is ir.DataType.FLOAT
        and value.is_initializer()
        and not value.is_graph_input()
        and is_read_once(value)
    )


def stored_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a graph stores for a value, if its caller cannot replace that."""
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def store_(value: ir.Value | None, numbers: np.ndarray) -> None:
    """Let an initializer hold other numbers, perhaps of another shape."""
    assert value is not None
    value.const_value = ir.tensor(np.ascontiguousarray(numbers), name=value.name)
    value.shape = ir.Shape(numbers.shape)


def store_integers_(graph: ir.Graph, name: str, numbers: int | Sequence[int]) -> ir.Value:
    """Add an initializer of whole numbers, such as a shape, under a name that is free."""
    array = np.array(numbers, dtype=np.int64)
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def stored_numbers(value: ir.Value | None) -> np.ndarray:
    """The numbers of an initializer; see :func:`is_own_weight`."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()
