"""Fold a scale per channel into the convolutions whose sum it multiplies.

Layer scale (ConvNeXt, MetaFormer...) multiplies a convolution's output by a constant per
channel. ONNX Runtime folds that into the convolution, but not into a sum of two::

    g * (conv(x, W) + conv(c, W_c))   ->   conv(x, g W) + conv(c, g W_c)

which leaves one pass over the activation less than the sum would have, and lets the residual
that follows be added by the convolution, see
:mod:`coordconv_patch.export.graph_passes.order_additions`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from coordconv_patch.export.graph_passes.refusals import RefusedError, RewriteResult, Tally
from coordconv_patch.export.graph_passes.vocabulary import (
    coordinate_sum,
    is_own_weight,
    is_read_once,
    store_,
    stored_numbers,
    stored_tensor,
    values_without_inputs,
)

__all__ = ["FoldScales"]


class FoldScales(ir.passes.InPlacePass):
    """Folds scales of sums of a convolution and its coordinate branch.

    A scale stays where something else reads the sum or its terms, or where weights are not
    float32 initializers that the convolutions have for themselves.
    """

    def call(self, model: ir.Model) -> RewriteResult:
        graph, tally = model.graph, Tally("fold_scales")
        independent = values_without_inputs(graph)
        for node in tuple(graph):
            scaled = _scaled_sum(node, independent)
            if scaled is not None:
                with tally.attempt(node):
                    _fold_(graph, node, *scaled)
                    tally.count += 1
        return tally.result(model)


def _scaled_sum(
    node: ir.Node, independent: set[ir.Value]
) -> tuple[ir.Node, ir.TensorProtocol] | None:
    """The coordinate sum that a node multiplies by stored numbers, and these."""
    if node.op_type != "Mul" or node.domain:
        return None
    for value, factor in (node.inputs, node.inputs[::-1]):
        addition, scale = coordinate_sum(value, independent), stored_tensor(factor)
        if addition is not None and scale is not None:
            return addition, scale
    return None


def _fold_(graph: ir.Graph, product: ir.Node, addition: ir.Node, scale: ir.TensorProtocol) -> None:
    if product.outputs[0].is_graph_output():
        raise RefusedError("the product is an output of the graph")
    if not is_read_once(addition.outputs[0]):
        raise RefusedError("the sum is read elsewhere too")
    if scale.dtype is not ir.DataType.FLOAT:
        raise RefusedError(f"the scale is {scale.dtype}, not FLOAT")
    convolutions = [_own_convolution(value) for value in addition.inputs]
    by_channel = _by_channel(scale.numpy(), convolutions[0])
    for convolution in convolutions:
        _multiply_(convolution, by_channel)
    product.outputs[0].replace_all_uses_with(addition.outputs[0])
    graph.remove(product, safe=True)


def _own_convolution(term: ir.Value | None) -> ir.Node:
    """The convolution that makes a term of the sum, whose weight and bias may change."""
    convolution = term.producer() if term is not None else None
    if term is None or convolution is None or convolution.op_type != "Conv":
        kind = "not computed" if convolution is None else f"a {convolution.op_type}"
        raise RefusedError(f"a term of the sum is {kind}, not a Conv")
    if not is_read_once(term):
        raise RefusedError(f"the output of {convolution.name} is read elsewhere too")
    if not all(is_own_weight(value) for value in convolution.inputs[1:] if value is not None):
        raise RefusedError(f"weights of {convolution.name} are not float32 initializers of its own")
    return convolution


def _by_channel(scale: np.ndarray, convolution: ir.Node) -> np.ndarray:
    """One number for each output channel; the scale must be constant along all other axes."""
    weight = stored_numbers(convolution.inputs[1])
    channels = len(weight)
    if scale.ndim > weight.ndim:
        raise RefusedError(f"the scale has {scale.ndim} axes, more than the sum's {weight.ndim}")
    shape = (1,) * (weight.ndim - scale.ndim) + scale.shape
    if shape[1] not in (1, channels) or any(length != 1 for length in shape[:1] + shape[2:]):
        raise RefusedError(f"the scale has shape {scale.shape}, not one number for each channel")
    return np.broadcast_to(scale.reshape(-1), channels)


def _multiply_(convolution: ir.Node, by_channel: np.ndarray) -> None:
    for value in convolution.inputs[1:]:
        if value is None:
            continue
        array = stored_numbers(value)
        store_(value, array * by_channel.reshape(-1, *(1,) * (array.ndim - 1)))
