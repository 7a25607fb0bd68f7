"""What a report of a fault needs to say about the place where it happened."""

from __future__ import annotations

from coordconv_patch.bench.machine import describe_machine

__all__ = ["environment"]

_PACKAGES = ("onnx-ir", "onnxscript", "numpy", "safetensors", "timm", "torchvision")


def environment() -> str:
    """Markdown lines: the machine, execution providers, and the versions of packages."""
    machine, versions = describe_machine(_PACKAGES).lines()
    return f"- machine: {machine}\n- execution providers: {_providers()}\n- versions: {versions}"


def _providers() -> str:
    """The execution providers of ONNX Runtime that load here, best first."""
    try:
        from coordconv_patch.runtime.providers import working_providers

        return ", ".join(working_providers())
    except ImportError as error:
        return f"none ({error})"
