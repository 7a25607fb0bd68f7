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

from coordconv_patch.export.graph_passes.order_additions import (
    is_branch,
    is_own_weight,
    is_read_once,
    stored_numbers,
    values_without_inputs,
)

__all__ = ["fold_scales_"]


def fold_scales_(graph: ir.Graph) -> int:
    """Fold scales of sums of a convolution and its coordinate branch, in place.

    A scale stays where something else reads the sum or its terms, or where weights are not
    float32 initializers that the convolutions have for themselves.

    Returns:
        How many were folded.
    """
    independent = values_without_inputs(graph)
    count = 0
    for node in list(graph):
        found = _scaled_sum(node)
        if found is None:
            continue
        addition, scale = found
        convolutions = _own_convolutions(addition)
        if convolutions is None or not any(
            is_branch(convolution.outputs[0], independent) for convolution in convolutions
        ):
            continue
        by_channel = _by_channel(scale, convolutions[0])
        if by_channel is None:
            continue
        for convolution in convolutions:
            _multiply_(convolution, by_channel)
        node.outputs[0].replace_all_uses_with(addition.outputs[0])
        graph.remove(node, safe=True)
        count += 1
    return count


def _scaled_sum(node: ir.Node) -> tuple[ir.Node, np.ndarray] | None:
    """The addition that a node multiplies by stored float32 numbers, and these."""
    if node.op_type != "Mul" or node.domain or node.outputs[0].is_graph_output():
        return None
    for value, factor in (node.inputs, node.inputs[::-1]):
        addition = value.producer() if value is not None else None
        tensor = ir.convenience.get_const_tensor(factor) if factor is not None else None
        if (
            addition is not None
            and addition.op_type == "Add"
            and addition.domain == ""
            and is_read_once(addition.outputs[0])
            and tensor is not None
            and tensor.dtype is ir.DataType.FLOAT
        ):
            return addition, tensor.numpy()
    return None


def _own_convolutions(addition: ir.Node) -> list[ir.Node] | None:
    """The convolutions that an addition adds up, if their weights and biases may change."""
    found = []
    for value in addition.inputs:
        node = value.producer() if value is not None else None
        if (
            value is None
            or node is None
            or node.op_type != "Conv"
            or not is_read_once(value)
            or not all(is_own_weight(weight) for weight in node.inputs[1:] if weight is not None)
        ):
            return None
        found.append(node)
    return found


def _by_channel(scale: np.ndarray, convolution: ir.Node) -> np.ndarray | None:
    """One number an output channel, if a factor is constant along all other axes."""
    weight = stored_numbers(convolution.inputs[1])
    if scale.ndim > weight.ndim:
        return None
    channels = len(weight)
    shape = (1,) * (weight.ndim - scale.ndim) + scale.shape
    if shape[1] not in (1, channels) or any(length != 1 for length in shape[:1] + shape[2:]):
        return None
    return np.broadcast_to(scale.reshape(-1), channels)


def _multiply_(convolution: ir.Node, by_channel: np.ndarray) -> None:
    for value in convolution.inputs[1:]:
        if value is None:
            continue
        array = stored_numbers(value)
        scaled = array * by_channel.reshape(-1, *(1,) * (array.ndim - 1))
        value.const_value = ir.tensor(scaled, name=value.name)
