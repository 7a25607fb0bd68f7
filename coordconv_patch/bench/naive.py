"""The concatenating CoordConv as common ports export it: what a patched export is held against.

Every convolution gets its coordinates as further input channels, ``Conv(Concat(x, c))`` with
c a constant, and the graph is what ``torch.onnx.export`` makes of that. Batch norms are left
to the exporter and the runtime. The function is the patched model's own, so that the two
files can be compared, and are.

Convolutions of torch.nn become what a port has: one widened weight, and the coordinates in a
buffer for each size. Subclasses and transposed ones take the lowering ``"channels"``, which
follows their own code.

A grouped convolution gives its coordinates to each group: what sees ``C / groups`` channels
sees ``C / groups + K``. (The ports themselves refuse such convolutions.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.export.axes import ExportRequest
from coordconv_patch.export.exporters import evaluation_copy, export_graph
from coordconv_patch.export.model_file import write_model
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import CONV_FUNCTIONS
from coordconv_patch.lowering.lower import lower_
from coordconv_patch.running.inputs import in_signature_order
from coordconv_patch.verification.torch_run import run_torch
from coordconv_patch.verification.verify import verify_onnx

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
    """Export a patched model in its concatenating form, check the file, and return its bytes.

    The arguments are those of :func:`coordconv_patch.export_onnx`. The bytes include weights beside
    the file.

    Raises:
        ExportError: If a patched convolution has no such form (functional ones have none),
            the exporters fail, or the file and torch disagree.
    """
    widened = evaluation_copy(model)
    inputs = in_signature_order(model, example_inputs)
    _widen_(widened)
    lower_(widened, inputs, lambda site: "channels")
    run_torch(widened, inputs)  # fills the buffers
    exported = export_graph(widened, ExportRequest(inputs, dynamic_batch), "auto")
    files = write_model(exported.model, Path(path))
    verify_onnx(model, path, inputs, providers=providers, tolerance=tolerance)
    return sum(file.stat().st_size for file in files)


class _Concatenating(nn.Module):
    """``conv([x ; c], [W ; W_c])`` as a port writes it, for a convolution of torch.nn."""

    def __init__(self, layer: CoordConvNd) -> None:
        super().__init__()
        # Both are (C_out, channels that one group sees, *kernel).
        self.weight = nn.Parameter(torch.cat((layer.weight, layer.coord_weight), dim=1).detach())
        self.bias = layer.bias
        self.coords = layer.coords
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self.function = CONV_FUNCTIONS[len(layer.kernel_size), False]

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        groups = self.geometry[-1]
        name = "coords_" + "_".join(map(str, size))
        if not hasattr(self, name):
            grid = self.coords.grid(tuple(size), device=x.device, dtype=x.dtype)
            self.register_buffer(name, grid.unsqueeze(0), persistent=False)
        grid = getattr(self, name)
        if groups == 1:
            joined = torch.cat((x, grid.expand(batch, *grid.shape[1:])), dim=1)
        else:
            each = x.reshape(batch, groups, channels // groups, *size)
            repeated = grid.unsqueeze(1).expand(batch, groups, *grid.shape[1:])
            joined = torch.cat((each, repeated), dim=2).flatten(1, 2)
        return self.function(joined, self.weight, self.bias, *self.geometry)


def _widen_(model: nn.Module) -> None:
    """Replace, in place, the patched layers that a port could stand for."""
    for name, layer in coord_layers(model).items():
        if not isinstance(layer, CoordConvNd) or not _is_ordinary(layer):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _Concatenating(layer))


def _is_ordinary(layer: CoordConvNd) -> bool:
    return (
        layer._plain_class in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and layer.padding_mode == "zeros"
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not hasattr(layer, "parametrizations")
    )
