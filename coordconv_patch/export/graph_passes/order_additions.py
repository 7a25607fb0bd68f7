"""Order the additions of coordinate branches as ONNX Runtime's CPU kernels like them.

Where a convolution, its branch and a residual are added up, the order is free::

    (conv(x) + branch) + residual   ->   branch + (conv(x) + residual)

ONNX Runtime fuses a sum into one of the convolutions that it adds up: into the first operand
that is one and has no sum yet. With the branch first, the main convolution still gets the
residual, as in the plain model, and the branch is added in place into what that convolution
has just written, while it is in the processor's cache. (ResNet-50, every convolution, one
thread: 1.17 of the plain model in the exporter's order, 1.11 with ``conv(x) + (branch +
residual)``, 1.06 so.) An activation that follows goes into the last of them.

A residual that is not in the kernels' blocks of channels (it comes from a transpose, as behind
a LayerNorm) cannot be fused in the plain model either, and is added last::

    residual + (branch + conv(x))
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

__all__ = [
    "coordinate_nodes",
    "is_branch",
    "is_own_weight",
    "is_read_once",
    "order_additions_",
    "stored_numbers",
    "values_without_inputs",
]


def order_additions_(graph: ir.Graph) -> int:
    """Put every coordinate branch first in the last addition of its sum, in place.

    Args:
        graph: An exported graph, in topological order. Its outputs may change by rounding.

    Returns:
        How many sums were rewritten.
    """
    independent = values_without_inputs(graph)
    in_blocks = _values_in_blocks(graph, independent)
    totals = [node for node in graph if _is_addition(node) and not _continues(node.outputs[0])]
    count = 0
    for total in totals:
        terms = list(_terms(total))
        branches = [term for term in terms if is_branch(term, independent)]
        others = [term for term in terms if term not in branches]
        if branches and others:
            fusable = [term for term in others if term in in_blocks]
            outside = [term for term in others if term not in in_blocks]
            if fusable:
                _rebuild_(graph, total, fusable, branches, outside)
            else:
                _rebuild_(graph, total, others, branches, [])
            count += 1
    if count:
        graph.sort()
    return count


def values_without_inputs(graph: ir.Graph) -> set[ir.Value]:
    """The values that depend on the shapes of the graph's inputs at most, not on their values."""
    found = set(graph.initializers.values()) - set(graph.inputs)
    for node in graph:
        if node.op_type == "Shape" or all(v is None or v in found for v in node.inputs):
            found.update(node.outputs)
    return found


def coordinate_nodes(graph: ir.Graph) -> tuple[str, ...]:
    """Names of the convolutions of coordinates, and of the nodes that lead to them.

    Every such node without a name is given one, in place.
    """
    independent = values_without_inputs(graph)
    found: dict[ir.Node, None] = {}
    pending = [node for node in graph if node.op_type == "Conv" and node.inputs[0] in independent]
    while pending:
        node = pending.pop()
        if node not in found and node.outputs[0] in independent:
            found[node] = None
            before = [value.producer() for value in node.inputs if value is not None]
            pending += [producer for producer in before if producer is not None]
    for number, node in enumerate(found):
        node.name = node.name or f"coordinates_{node.op_type}_{number}"
    return tuple(str(node.name) for node in found)


def is_branch(value: ir.Value, independent: set[ir.Value]) -> bool:
    """Whether a value is a convolution of coordinates, and used here alone."""
    producer = value.producer()
    return (
        producer is not None
        and producer.op_type == "Conv"
        and producer.inputs[0] in independent
        and len(value.uses()) == 1
    )


def is_own_weight(value: ir.Value) -> bool:
    """Whether a value is a float32 initializer that one node alone reads, so that it may change.

    What a Constant node holds is none: its numbers stand in the node.
    """
    tensor = value.const_value
    return (
        tensor is not None
        and tensor.dtype is ir.DataType.FLOAT
        and value.is_initializer()
        and not (value.is_graph_input() or value.is_graph_output())
        and len(value.uses()) == 1
    )


_MAKE_BLOCKS = frozenset({"Conv"})
_KEEP_BLOCKS = frozenset(
    {
        *("Add", "Sum", "Mul", "Concat", "Resize", "Upsample", "BatchNormalization"),
        *("Relu", "Sigmoid", "Tanh", "HardSigmoid"),
        *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
    }
)
"""What ONNX Runtime's ``NchwcTransformer`` computes on blocks of channels."""


def _values_in_blocks(graph: ir.Graph, independent: set[ir.Value]) -> set[ir.Value]:
    """The activations that ONNX Runtime's CPU provider keeps in blocks of channels."""
    found: set[ir.Value] = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and value not in independent]
        keeps = node.op_type in _KEEP_BLOCKS and inputs and all(v in found for v in inputs)
        if node.op_type in _MAKE_BLOCKS or keeps:
            found.update(node.outputs)
    return found


def stored_numbers(value: ir.Value | None) -> np.ndarray:
    """The numbers of a value that the graph stores; check :func:`is_own_weight` before."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def is_read_once(value: ir.Value) -> bool:
    """Whether one node alone reads a value, and the graph does not put it out."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _is_addition(node: ir.Node) -> bool:
    return node.op_type == "Add" and node.domain == ""


def _continues(value: ir.Value) -> bool:
    """Whether a sum is but a term of a larger one."""
    users = tuple(value.uses())
    return len(users) == 1 and not value.is_graph_output() and _is_addition(users[0].node)


def _inner_addition(value: ir.Value) -> ir.Node | None:
    producer = value.producer()
    if producer is not None and _is_addition(producer) and _continues(value):
        return producer
    return None


def _terms(node: ir.Node) -> Iterator[ir.Value]:
    for value in node.inputs:
        assert value is not None  # an Add has two operands
        inner = _inner_addition(value)
        if inner is None:
            yield value
        else:
            yield from _terms(inner)


def _additions_below(node: ir.Node) -> Iterator[ir.Node]:
    """The additions whose results a sum adds up, outermost first."""
    for value in node.inputs:
        inner = _inner_addition(value) if value is not None else None
        if inner is not None:
            yield inner
            yield from _additions_below(inner)


def _rebuild_(
    graph: ir.Graph,
    total: ir.Node,
    first: list[ir.Value],
    branches: list[ir.Value],
    last: list[ir.Value],
) -> None:
    """Make ``total`` the sum of some terms, then of the branches, each a first operand, then more.

    Args:
        graph: The graph.
        total: The outermost addition.
        first: Terms that are added up first.
        branches: The coordinate branches among the terms.
        last: Terms that are added last.
    """
    before = list(_additions_below(total))
    running, *rest = first
    operands: list[tuple[ir.Value, bool]] = [(term, False) for term in rest]
    operands += [(branch, True) for branch in branches]
    operands += [(term, False) for term in last]
    for index, (term, goes_first) in enumerate(operands):
        pair = (term, running) if goes_first else (running, term)
        if index == len(operands) - 1:
            for position, value in enumerate(pair):
                total.replace_input_with(position, value)
            break
        node = ir.node("Add", pair)
        node.outputs[0].type = total.outputs[0].type
        # A partial sum may be smaller than the whole, where a term is broadcast.
        node.outputs[0].shape = term.shape if term.shape == running.shape else None
        graph.insert_before(total, node)
        running = node.outputs[0]
    graph.remove(before, safe=True)
