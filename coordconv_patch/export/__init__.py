"""Export to ONNX, verification and benchmarks in ONNX Runtime."""

from coordconv_patch.export.onnx import export_onnx
from coordconv_patch.export.report import ExportReport
from coordconv_patch.export.verify import Check, verify_onnx

__all__ = ["Check", "ExportReport", "export_onnx", "verify_onnx"]
