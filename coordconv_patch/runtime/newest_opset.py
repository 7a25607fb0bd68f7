"""The newest ONNX operator set that the ONNX Runtime which is installed reads."""

from __future__ import annotations

import functools

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from coordconv_patch.runtime.providers import CPU

__all__ = ["newest_opset"]

_IR_VERSION = 8
"""Older than any operator set asked about, so that only the operator set decides."""


@functools.cache
def newest_opset() -> int:
    """The newest operator set that both the onnx package knows and ONNX Runtime reads.

    ONNX Runtime does not say which that is, so it is given graphs of one node, newest first.
    """
    newest = onnx.defs.onnx_opset_version()
    return next((opset for opset in range(newest, 0, -1) if _reads(opset)), newest)


def _reads(opset: int) -> bool:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    except Exception:
        return False
    return True
