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
from typing import TypeAlias

import onnx_ir as ir

from coordconv_patch.export.graph_passes.refusals import RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import (
    is_addition,
    is_branch,
    is_read_once,
    values_without_inputs,
)

__all__ = ["OrderAdditions"]

_Sum: TypeAlias = "ir.Value | _Pair"
"""A term, or two sums that are added up."""

_Pair: TypeAlias = tuple[_Sum, _Sum]


class OrderAdditions(ir.passes.InPlacePass):
    """Puts every coordinate branch first in the last addition of its sum.

    The graph's nodes must be in topological order; its outputs may change by rounding.
    """

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("order_additions")
        independent = values_without_inputs(graph)
        in_blocks = _values_in_blocks(graph, independent)
        totals = [node for node in graph if is_addition(node) and not _continues(node.outputs[0])]
        for total in totals:
            operands = _operands(total)
            ordered = _ordered(operands, independent, in_blocks)
            if ordered != operands:
                _rebuild_(graph, total, ordered)
                tally.count += 1
        if tally.count:
            graph.sort()
        return tally.result(model)


_KEEP_BLOCKS = frozenset(
    {
        *("Add", "Sum", "Mul", "Concat", "Resize", "Upsample", "BatchNormalization"),
        *("Relu", "Sigmoid", "Tanh", "HardSigmoid"),
        *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
    }
)
"""What ONNX Runtime's ``NchwcTransformer`` computes on blocks, which convolutions make."""


def _values_in_blocks(graph: ir.Graph, independent: set[ir.Value]) -> set[ir.Value]:
    """The activations that ONNX Runtime's CPU provider keeps in blocks of channels."""
    in_blocks: set[ir.Value] = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and value not in independent]
        keeps = node.op_type in _KEEP_BLOCKS and inputs and all(v in in_blocks for v in inputs)
        if node.op_type == "Conv" or keeps:
            in_blocks.update(node.outputs)
    return in_blocks


def _continues(value: ir.Value) -> bool:
    """Whether a sum is but a term of a larger one."""
    return is_read_once(value) and is_addition(next(iter(value.uses())).node)


def _inner_addition(value: ir.Value) -> ir.Node | None:
    producer = value.producer()
    return producer if is_addition(producer) and _continues(value) else None


def _operands(addition: ir.Node) -> _Pair:
    """What an addition adds up, as the graph computes it now."""
    left, right = addition.inputs
    assert left is not None  # an Add has two operands
    assert right is not None
    return _sum_of(left), _sum_of(right)


def _sum_of(value: ir.Value) -> _Sum:
    inner = _inner_addition(value)
    return value if inner is None else _operands(inner)


def _terms(total: _Sum) -> Iterator[ir.Value]:
    if isinstance(total, ir.Value):
        yield total
    else:
        for part in total:
            yield from _terms(part)


def _ordered(operands: _Pair, independent: set[ir.Value], in_blocks: set[ir.Value]) -> _Pair:
    """The same sum in the order that the kernels like; as it is where no branch is in it."""
    terms = list(_terms(operands))
    branches = [term for term in terms if is_branch(term, independent)]
    others = [term for term in terms if term not in branches]
    if not branches or not others:
        return operands
    fusable = [term for term in others if term in in_blocks]
    last = [term for term in others if term not in in_blocks] if fusable else []
    running: _Sum
    running, *rest = fusable or others
    for term in rest:
        running = running, term
    for branch in branches:
        running = branch, running
    for term in last:
        running = running, term
    assert isinstance(running, tuple)
    return running


def _additions_below(node: ir.Node) -> Iterator[ir.Node]:
    """The additions whose results a sum adds up, outermost first."""
    for value in node.inputs:
        inner = _inner_addition(value) if value is not None else None
        if inner is not None:
            yield inner
            yield from _additions_below(inner)


def _rebuild_(graph: ir.Graph, total: ir.Node, ordered: _Pair) -> None:
    """Make the outermost addition compute a sum in another order."""
    before = list(_additions_below(total))
    for position, term in enumerate(ordered):
        total.replace_input_with(position, _value_of(term, graph, total))
    graph.remove(before, safe=True)


def _value_of(term: _Sum, graph: ir.Graph, total: ir.Node) -> ir.Value:
    """The value of a term, for which additions are put before the outermost one."""
    if isinstance(term, ir.Value):
        return term
    left, right = (_value_of(part, graph, total) for part in term)
    node = ir.node("Add", [left, right])
    node.outputs[0].type = total.outputs[0].type
    # A partial sum may be smaller than the whole, where a term is broadcast.
    node.outputs[0].shape = left.shape if left.shape == right.shape else None
    graph.insert_before(total, node)
    return node.outputs[0]
