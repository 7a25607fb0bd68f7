"""ONNX files of the variants: plain, patched, ported."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.export.axes import ExportRequest
from coordconv_patch.export.exporters import export_graph
from coordconv_patch.export.model_file import write_model
from coordconv_patch.runtime.providers import CPU

__all__ = ["write_plainly", "write_verified"]


def write_verified(
    model: nn.Module,
    example: Tensor,
    path: Path,
    lowering: str = "auto",
    *,
    places: bool = False,
) -> None:
    """Export with this package: lowered, ordered and compared with torch; any batch size.

    With ``places``, the file has an input for the places of the images.

    Random weights make activations that rounding moves more than trained ones do, so the
    tolerance is that of a quick check.
    """
    ccp.export_onnx(
        model, path, example, lowering=lowering, places=places, providers=[CPU], tolerance=1e-3
    )


def write_plainly(model: nn.Module, example: Tensor, path: Path) -> None:
    """Export as anyone does, for any batch size: ``torch.onnx.export``, and nothing else.

    With ``dynamo=True``, or where that fails with ``dynamo=False``, as ``export_onnx`` does.

    Args:
        model: In evaluation mode.
        example: (N, C, H, W) with N > 1: torch.export takes a length of one for a constant.
        path: The file to write.
    """
    # A copy: an export leaves tensors without values in models that keep some (ultralytics').
    model = copy.deepcopy(model)
    write_model(export_graph(model, ExportRequest(example), "auto").model, path)
