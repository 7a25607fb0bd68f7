"""Check a bfloat16 graph where the runtime cannot compute in bfloat16.

ONNX Runtime's CPU provider has no bfloat16 convolution. The graph is sound all the same, and
GPUs run it; so what is checked there is the same graph with every bfloat16 made a float32,
the weights' values as they are.
"""

from __future__ import annotations

import os

import numpy as np
import onnx_ir as ir

__all__ = ["has_bfloat16", "in_float32"]


def has_bfloat16(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds bfloat16 weights; ``False`` if it is not an ONNX file."""
    try:
        graph = ir.load(path).graph
    except Exception:  # protobuf's own errors, which no package of ours names
        return False
    return any(value.dtype is ir.DataType.BFLOAT16 for value in graph.initializers.values())


def in_float32(path: str | os.PathLike[str]) -> bytes:
    """The graph of a file with every bfloat16 widened to float32, serialised."""
    model = ir.load(path)
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        _widen_(value)
    for node in graph:
        for output in node.outputs:
            _widen_(output)
        for name, attribute in list(node.attributes.items()):
            widened = _widened(node, attribute)
            if widened is not None:
                node.attributes[name] = widened
    return bytes(ir.to_proto(model).SerializeToString())


def _widen_(value: ir.Value) -> None:
    if value.dtype is not ir.DataType.BFLOAT16:
        return
    if value.const_value is not None:
        value.const_value = _in_float32(value.const_value, value.name)
    value.dtype = ir.DataType.FLOAT


def _widened(node: ir.Node, attribute: ir.Attr) -> ir.Attr | None:
    """The attribute for float32, if it names or holds bfloat16."""
    if attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.dtype is ir.DataType.BFLOAT16:
            return ir.AttrTensor(attribute.name, _in_float32(tensor, tensor.name))
    names_a_dtype = node.op_type == "Cast" and attribute.name == "to"
    if names_a_dtype and attribute.as_int() == ir.DataType.BFLOAT16:
        return ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    return None


def _in_float32(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=name)
