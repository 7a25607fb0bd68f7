"""Replace every node that computes from stored values alone by what it computes.

Runtimes do so when they load a file, but not all of them: some refuse a convolution, a product or
an expansion of constants. What a node computes is worked out by ONNX's reference implementation.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants_ir

from coordconv_patch.export.graph_passes.refusals import RefusedError, RewriteResult, Tally

__all__ = ["EvaluateConstants", "nodes_of_constants"]

_LARGEST = 1 << 31
"""Numbers in what is evaluated: all that a file can hold."""

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

    A node whose operator cannot be evaluated stays, and is among the refusals.
    """

    def call(self, model: ir.Model) -> RewriteResult:
        tally = Tally("evaluate_constants")
        nodes = nodes_of_constants(model.graph)
        if nodes:
            chosen = set(nodes)
            fold_constants_ir(
                model,
                input_size_limit=_LARGEST,
                output_size_limit=_LARGEST,
                should_fold=chosen.__contains__,
            )
            LiftConstantsToInitializersPass(size_limit=0)(model)
            RemoveUnusedNodesPass()(model)
        for node in nodes_of_constants(model.graph):
            with tally.attempt(node):
                raise RefusedError(f"ONNX's reference cannot evaluate {node.op_type}")
        tally.count = len(nodes) - len(tally.refusals)
        return tally.result(model)
