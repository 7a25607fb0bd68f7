"""The newest ONNX operator set that the ONNX Runtime which is installed reads."""

from __future__ import annotations

import functools

import onnx

from coordconv_patch.errors import ExportError
from coordconv_patch.runtime.providers import CPU, make_session, probe_model

__all__ = ["newest_opset"]


@functools.cache
def newest_opset() -> int:
    """The newest operator set that both the onnx package knows and ONNX Runtime reads.

    ONNX Runtime does not say which that is, so it is given graphs of one node, newest first.
    """
    newest = onnx.defs.onnx_opset_version()
    return next((opset for opset in range(newest, 0, -1) if _reads(opset)), newest)


def _reads(opset: int) -> bool:
    try:
        make_session(probe_model(opset), [CPU])
    except ExportError:
        return False
    return True
