"""Public names that need ONNX, which is an extra: imported when they are first asked for.

``from coordconv_patch import export_onnx`` imports ONNX and ONNX Runtime, and
``import coordconv_patch`` does not: patching, training, saving and folding work without them.
"""

from __future__ import annotations

import importlib
from typing import Any

from coordconv_patch.packages import require_packages

__all__ = ["ONNX_NAMES", "onnx_name"]

ONNX_NAMES = {
    "ExportReport": "coordconv_patch.export.report",
    "Target": "coordconv_patch.export.targets",
    "export_onnx": "coordconv_patch.export.onnx",
    "register_target": "coordconv_patch.export.targets",
    "verify_onnx": "coordconv_patch.verification.verify",
}
"""The modules that these names of the root come from."""


def onnx_name(name: str) -> Any:
    """What a name of the root means that ``import coordconv_patch`` has not bound.

    Raises:
        AttributeError: If the root has no such name.
        MissingPackageError: If it needs packages that are not installed.
    """
    if name not in ONNX_NAMES:
        raise AttributeError(f"module 'coordconv_patch' has no attribute {name!r}")
    require_packages(f"coordconv_patch.{name}", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    return getattr(importlib.import_module(ONNX_NAMES[name]), name)
