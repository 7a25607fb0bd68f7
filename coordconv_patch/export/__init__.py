"""Export to ONNX, verification and benchmarks in ONNX Runtime."""

from coordconv_patch.export.onnx import ExportReport, export_onnx
from coordconv_patch.export.verify import Check, verify_onnx

__all__ = ["Check", "ExportReport", "export_onnx", "verify_onnx"]
