"""ONNX files of the variants: plain, patched, ported."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.export.providers import CPU

__all__ = ["write_plainly", "write_verified"]


def write_verified(model: nn.Module, example: Tensor, path: Path) -> None:
    """Export with this package: lowered, ordered and compared with torch; any batch size.

    Random weights make activations that rounding moves more than trained ones do, so the
    tolerance is that of a quick check.
    """
    ccp.export_onnx(model, path, example, providers=[CPU], tolerance=1e-3)


def write_plainly(model: nn.Module, example: Tensor, path: Path) -> None:
    """Export as anyone does: ``torch.onnx.export``, for any batch size.

    Args:
        model: In evaluation mode.
        example: (N, C, H, W) with N > 1: torch.export takes a length of one for a constant.
        path: The file to write.
    """
    # A copy: an export leaves tensors without values in models that keep some (ultralytics').
    model = copy.deepcopy(model)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                str(path),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                external_data=False,
                verbose=False,
            )
    finally:
        logging.disable(level)
