"""The ONNX operator set of an export: which can be asked for, and which a file has."""

from __future__ import annotations

from typing import Any

import onnx_ir

from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.runtime.newest_opset import newest_opset

__all__ = ["can_ask_for", "check_opset", "opset_of", "require_opset"]

_OLDEST = 7
"""ONNX Runtime promises to read operator sets from this one on."""

_NEWEST_OF_TORCHSCRIPT = 23
"""The TorchScript exporter of torch 2.14 refuses newer ones; the other one writes what it can."""

_OWN_DOMAIN = ("", "ai.onnx")


def check_opset(opset: Any, exporter: str) -> None:
    """Raise an ArgumentError if an operator set cannot be asked for; ``None`` asks for none.

    A file is checked in ONNX Runtime, so what that cannot read cannot be asked for.
    """
    if opset is None:
        return
    newest = newest_opset()
    if exporter == "torchscript":
        newest = min(newest, _NEWEST_OF_TORCHSCRIPT)
    if type(opset) is not int or not _OLDEST <= opset <= newest:
        kind = "" if type(opset) is int else f" is a {type(opset).__name__}"
        raise ArgumentError(
            f"opset={opset!r}{kind}: write a whole number from {_OLDEST} to {newest} "
            f"(exporter={exporter!r}), or None for the exporter's choice"
        )


def can_ask_for(opset: int | None, exporter: str) -> bool:
    """Whether an exporter takes an operator set at all; what it then writes is another matter."""
    return opset is None or exporter != "torchscript" or opset <= _NEWEST_OF_TORCHSCRIPT


def opset_of(model: onnx_ir.Model) -> int:
    """The operator set of ONNX's own domain that a graph is written in."""
    return max(version for domain, version in model.opset_imports.items() if domain in _OWN_DOMAIN)


def require_opset(model: onnx_ir.Model, opset: int | None, exporter: str) -> None:
    """Raise an ExportError if a graph has another operator set than was asked for.

    torch.export's exporter writes graphs of operator set 18 or newer, and has onnxscript's and
    onnx's version converters bring them to another; where they cannot, it writes what it has, and
    says nothing. ``exporter`` is the one asked for: ``"auto"`` tries the other one by itself.
    """
    written = opset_of(model)
    if opset is None or written == opset:
        return
    other = ""
    if exporter == "dynamo" and can_ask_for(opset, "torchscript"):
        other = f", or exporter='torchscript' ({_OLDEST} to {_NEWEST_OF_TORCHSCRIPT})"
    raise ExportError(
        f"opset={opset} was asked for, but torch.export's exporter could only write "
        f"operator set {written} for this model: pass opset={written} or None{other}"
    )
