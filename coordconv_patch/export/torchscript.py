"""torch's older ONNX exporter, which traces a model with TorchScript."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import nn

from coordconv_patch.export.axes import ExportRequest, inputs_for_tracing
from coordconv_patch.export.graph_passes.evaluate_constants import EvaluateConstants
from coordconv_patch.export.graph_passes.read_sizes_once import ReadSizesOnce
from coordconv_patch.export.graph_passes.unguard_lengths import UnguardLengths
from coordconv_patch.running.inputs import split_inputs, tensors_in

__all__ = ["export_torchscript"]

_FIRST_IR_WITH_INITIALIZERS_APART = 4
"""Before operator set 9 the exporter writes an older one, where initializers are inputs, too."""

_MOST_ROUNDS = 8
"""Of reading lengths and evaluating what is made of them."""


def export_torchscript(model: nn.Module, request: ExportRequest) -> onnx_ir.Model:
    """The graph of an evaluating model by a TorchScript trace; raises whatever torch does."""
    args, kwargs = split_inputs(inputs_for_tracing(request))
    names = list(request.input_names or _argument_names(model, args, kwargs, request.axes))
    # The exporter only writes files: with more than 2 GB one for each tensor, constants too.
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "traced.onnx"
        torch.onnx.export(
            _Wrapped(model) if isinstance(model, torch.fx.GraphModule) else model,
            (*args, kwargs) if kwargs else args,
            str(path),
            dynamo=False,
            opset_version=request.opset,
            input_names=names,
            output_names=request.output_names,
            dynamic_axes=dict(zip(names, request.axes, strict=False)),
        )
        graph = onnx_ir.from_proto(onnx.load(path))
    graph.ir_version = max(graph.ir_version, _FIRST_IR_WITH_INITIALIZERS_APART)
    _simplify_(graph)
    return graph


def _simplify_(graph: onnx_ir.Model) -> None:
    """Fold sizes and constants, so that the graph is like that of the other exporter, in place.

    A graph with graphs in its nodes (loops and branches, as two-stage detectors have) stays:
    folding such ones left values behind that no node gives.
    """
    if len(list(graph.graphs())) > 1:
        return
    UnguardLengths()(graph)
    for _ in range(_MOST_ROUNDS):  # what is evaluated lets inference know more lengths
        if not (ReadSizesOnce()(graph).modified and EvaluateConstants()(graph).modified):
            break
    optimize_ir(graph)  # as torch.onnx does with what its other exporter makes


class _Wrapped(nn.Module):
    """A GraphModule inside a plain module: the TorchScript exporter mistakes its ``graph``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _argument_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: Sequence[Any]
) -> list[str]:
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    names = []
    for name, value in bound.items():
        count = len(tensors_in(value))
        names += [name] if count == 1 else [f"{name}_{index}" for index in range(count)]
    return names if len(names) == len(axes) else [f"input_{index}" for index in range(len(axes))]
