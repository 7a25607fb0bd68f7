"""Replace every node that computes from stored values alone by what it computes.

Runtimes do so when they load a file, but not all of them: some refuse a convolution, a product or
an expansion of constants. What a node computes is worked out by ONNX's reference implementation.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from coordconv_patch.export.graph_passes.refusals import RefusedError, RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import holds_coordinates, mark_as_coordinates_

__all__ = ["EvaluateConstants", "nodes_of_constants"]

_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"}
)


def nodes_of_constants(graph: ir.Graph) -> tuple[ir.Node, ...]:
    """The nodes that compute from stored values alone, so that every run repeats their results."""
    constant = {v for v in graph.initializers.values() if not v.is_graph_input()}
    nodes = []
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type not in _RANDOM and all(value in constant for value in inputs):
            constant.update(node.outputs)
            nodes.append(node)
    return tuple(nodes)


class EvaluateConstants(ir.passes.InPlacePass):
    """Leaves no node in a graph that computes from stored values alone.

    A node that ONNX's reference cannot evaluate stays, and is among the refusals.
    """

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("evaluate_constants")
        LiftConstantsToInitializersPass(size_limit=0)(model)
        for node in nodes_of_constants(graph):
            with tally.attempt(node):
                for value, array in zip(node.outputs, _evaluated(node, model), strict=True):
                    if any(map(holds_coordinates, node.inputs)):
                        mark_as_coordinates_(value)
                    _store_in_place_of_(graph, value, array)
                tally.count += 1
        if tally.count:
            RemoveUnusedNodesPass()(model)
        return tally.result(model)


def _evaluated(node: ir.Node, model: ir.Model) -> list[np.ndarray]:
    """What a node computes from stored values; a RefusedError if that cannot be told."""
    if any(value is not None and value.const_value is None for value in node.inputs):
        raise RefusedError("what it reads could not be evaluated")
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attribute in node.attributes.values()
    ):
        raise RefusedError(f"it is of the kind {node.op_type}, with a graph of its own")
    given = {
        str(value.name): value.const_value.numpy()
        for value in node.inputs
        if value is not None and value.const_value is not None
    }
    proto = ir.to_proto(node)
    inputs = [onnx.ValueInfoProto(name=name) for name in given]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output]
    graph = onnx.helper.make_graph([proto], "node", inputs, outputs)
    imports = [onnx.helper.make_opsetid(*item) for item in model.opset_imports.items()]
    try:
        results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=imports)).run(
            None, given
        )
    except Exception as error:  # whatever the operator's implementation raises
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise RefusedError(f"ONNX's reference cannot evaluate {node.op_type} ({reason})") from error
    if not all(isinstance(result, (np.ndarray, np.generic)) for result in results):
        raise RefusedError(f"{node.op_type} does not give tensors")
    return [np.asarray(result) for result in results]


def _store_in_place_of_(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    """Let an initializer be read where a computed value was; an output of the graph stays one."""
    if value.is_graph_output():
        raise RefusedError("it is an output of the graph")
    name = f"{value.name}_evaluated"
    stored = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name),
    )
    stored.meta.update(value.meta)
    graph.register_initializer(stored)
    value.replace_all_uses_with(stored)
