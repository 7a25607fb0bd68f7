"""Put a zero into a graph of a fixed batch that is computed, and that ONNX Runtime does not fold.

The graph has an input for it, see :mod:`coordconv_patch.lowering.unknown_zero`. Afterwards
coordinates are expanded as in a graph with a dynamic batch, and the input is gone::

    Expand(c + zero, shape)    ->    Expand(c, shape + 0 * Size(x))

``Size`` of the graph's first input costs nothing. Other runtimes fold it, and the coordinates too.
"""

from __future__ import annotations

import onnx_ir as ir

from coordconv_patch.export.graph_passes.refusals import RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import store_integers_, stored_tensor
from coordconv_patch.lowering.unknown_zero import ZERO

__all__ = ["ReadZero"]


class ReadZero(ir.passes.InPlacePass):
    """Replaces the input that is zero, if a graph has one; the first of the rewrites."""

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("read_zero")
        zero = next((value for value in graph.inputs if value.name == ZERO), None)
        if zero is None:
            return tally.result(model)
        graph.inputs.remove(zero)
        expander = _Expander(graph)
        # In other types where coordinates are of others.
        casts = [node for node, _ in zero.uses() if node.op_type in ("Cast", "Identity")]
        forms = {zero, *(cast.outputs[0] for cast in casts)}
        additions = [node for form in forms for node, _ in form.uses() if node.op_type == "Add"]
        for addition in additions:
            (coordinates,) = (value for value in addition.inputs if value not in forms)
            assert coordinates is not None
            _replace_(addition, coordinates, expander)
            tally.count += 1
        for node in (*additions, *casts):
            _remove(node)
        return tally.result(model)


def _replace_(addition: ir.Node, coordinates: ir.Value, expander: _Expander) -> None:
    """Let what reads a sum with the zero read the coordinates, expanded at run time."""
    for node, index in tuple(addition.outputs[0].uses()):
        lengths = _lengths_read_by(node, coordinates)
        if lengths is None:  # known at run time alone: runtimes may fold what comes of it
            node.replace_input_with(index, coordinates)
        elif node.op_type == "Expand":
            result = expander.expanded(coordinates, lengths, addition)
            node.outputs[0].replace_all_uses_with(result)
            _remove(node)
        else:
            node.replace_input_with(index, expander.expanded(coordinates, lengths, addition))


def _lengths_read_by(node: ir.Node, coordinates: ir.Value) -> tuple[int, ...] | None:
    """The shape that a node expands coordinates to, or reads them in; ``None``: not known."""
    if node.op_type != "Expand":  # a batch of one
        return _lengths(coordinates)
    shape = stored_tensor(node.inputs[1])
    return None if shape is None else tuple(int(length) for length in shape.numpy())


def _lengths(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a value, where all of it is known."""
    shape = value.shape
    return None if shape is None or not shape.is_static() else tuple(shape.numpy())


class _Expander:
    """Expands coordinates to shapes that are computed; equal ones once, at the graph's begin."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        first = graph[0]
        size = ir.node("Size", [graph.inputs[0]])
        self._zero = ir.node("Mul", [size.outputs[0], store_integers_(graph, f"{ZERO}_factor", 0)])
        self._begin = self._zero
        graph.insert_before(first, [size, self._zero])
        self._results: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        self._shapes: dict[tuple[int, ...], ir.Value] = {}

    def expanded(
        self, coordinates: ir.Value, lengths: tuple[int, ...], before: ir.Node
    ) -> ir.Value:
        """Coordinates, expanded to lengths; before a node where they are not stored."""
        is_stored = coordinates.is_initializer() and coordinates.graph is self._graph
        if is_stored and (coordinates, lengths) in self._results:
            return self._results[coordinates, lengths]
        node = ir.node("Expand", [coordinates, self._shape(lengths)])
        result = node.outputs[0]
        result.type = coordinates.type
        known = _lengths(coordinates)
        if known is not None:  # runtimes, which fuse sums of equal shapes, cannot infer it
            result.shape = ir.Shape([max(pair) for pair in zip(lengths, known, strict=True)])
        if is_stored:
            self._insert(node)
            self._results[coordinates, lengths] = result
        else:
            assert before.graph is not None
            before.graph.insert_before(before, node)
        return result

    def _shape(self, lengths: tuple[int, ...]) -> ir.Value:
        if lengths not in self._shapes:
            name = f"{ZERO}_shape_{'_'.join(map(str, lengths))}"
            node = ir.node(
                "Add", [self._zero.outputs[0], store_integers_(self._graph, name, lengths)]
            )
            self._insert(node)
            self._shapes[lengths] = node.outputs[0]
        return self._shapes[lengths]

    def _insert(self, node: ir.Node) -> None:
        self._graph.insert_after(self._begin, node)
        self._begin = node


def _remove(node: ir.Node) -> None:
    assert node.graph is not None
    node.graph.remove(node, safe=True)
