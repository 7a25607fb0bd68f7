"""The concatenating CoordConv as common ports export it: what a patched export is held against.

Every convolution gets its coordinates as further input channels, ``Conv(Concat(x, c))`` with
c a constant, and the graph is what ``torch.onnx.export`` makes of that. Batch norms are left
to the exporter and the runtime. The function is the patched model's own, so that the two
files can be compared, and are.

A grouped convolution gives its coordinates to each group: what sees ``C / groups`` channels
sees ``C / groups + K``. (The ports themselves refuse such convolutions.)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from coordconv_patch.errors import ExportError
from coordconv_patch.export.axes import ExportRequest
from coordconv_patch.export.exporters import write_graph
from coordconv_patch.export.verify import verify_onnx
from coordconv_patch.inputs import in_signature_order
from coordconv_patch.passes.lower import lower_

__all__ = ["export_naive"]


def export_naive(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    providers: Sequence[str] | None = None,
    tolerance: float = 1e-4,
) -> int:
    """Export a patched model in its concatenating form, and check the file against torch.

    Args:
        model: A patched model.
        path: The ONNX file to write.
        example_inputs: As for :func:`coordconv_patch.export_onnx`.
        dynamic_batch: Whether the batch is dynamic.
        providers: Execution providers to check on; ``None``: those that work here.
        tolerance: Largest difference allowed, relative to the largest output.

    Returns:
        Bytes of the file.

    Raises:
        ExportError: If a patched convolution has no such form (functional ones have none),
            the exporters fail, or the file and torch disagree.
    """
    try:
        widened = copy.deepcopy(model)
    except Exception as error:
        raise ExportError(
            f"the model cannot be deep-copied, which an export needs: {error}"
        ) from error
    for module in widened.modules():  # not eval(): models of torch.export refuse it
        module.training = False
    inputs = in_signature_order(model, example_inputs)
    lower_(widened, inputs, lambda site: "channels")
    request = ExportRequest(widened, inputs, dynamic_batch, False, None, None, None)
    write_graph(request, Path(path), "auto")
    verify_onnx(path, model, inputs, providers=providers, tolerance=tolerance)
    return Path(path).stat().st_size
