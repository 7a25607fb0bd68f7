"""torch's two ONNX exporters: torch.export's, and TorchScript's where that one fails."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coordconv_patch.errors import ExportError, first_line
from coordconv_patch.export.axes import ExportRequest, inputs_for_tracing
from coordconv_patch.export.opset import check_exporter, require_opset
from coordconv_patch.left_behind.watch import release_watches_
from coordconv_patch.running.inputs import split_inputs, tensors_in
from coordconv_patch.running.silence import output_silenced, warnings_ignored
from coordconv_patch.running.tracing_gate import tracing_alone
from coordconv_patch.running.untouched import copied

__all__ = [
    "evaluation_copy",
    "write_graph",
]

_MAX_PROTOBUF_BYTES = 2_000_000_000
"""ONNX files are protobuf messages, which end at 2 GiB; larger weights go to a file beside."""


_BFLOAT16_OPSET = 22


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode and without gradients, for an exporter.

    Raises:
        ExportError: If the model cannot be copied.
    """
    evaluated = copied(model, ExportError, "an export works on a copy")
    release_watches_(evaluated)  # the export rewrites it, coordinates included
    for module in evaluated.modules():  # not eval(): models of torch.export refuse it
        module.training = False
    # With gradients, attention whose mask is trained (Swin, BEiT) takes another path through torch
    # than in the exporter's next step, which then meets strides that it cannot view.
    return evaluated.requires_grad_(False)


def write_graph(request: ExportRequest, path: Path, exporter: str) -> tuple[str, list[str]]:
    """Write the graph with the exporter asked for; returns the one that did it, and notes."""
    check_exporter(exporter)
    if exporter == "torchscript":
        _export_torchscript(request, path)
        return "torchscript", []
    before = set(path.parent.iterdir())
    try:
        _export_dynamo(request, path)
        require_opset(path, request.opset)
    except OSError:  # the file cannot be written, so another exporter could not either
        raise
    except Exception as error:
        if exporter == "dynamo":
            if isinstance(error, ExportError):
                raise
            raise ExportError(_reason("torch.export", error, request)) from error
        for partial in set(path.parent.iterdir()) - before:
            partial.unlink()
        try:
            _export_torchscript(request, path)
        except ExportError as second:
            first = (
                str(error)
                if isinstance(error, ExportError)
                else _reason("torch.export", error, request)
            )
            raise ExportError(f"{first}\n{second}") from error
        why = (
            f"torch.export's exporter could not write operator set {request.opset} for this model"
            if isinstance(error, ExportError)
            else f"torch.export could not export it ({_root_cause(error)})"
        )
        return "torchscript", [f"{why}; the TorchScript exporter did"]
    return "dynamo", []


def _export_dynamo(request: ExportRequest, path: Path) -> None:
    args, kwargs = split_inputs(inputs_for_tracing(request))
    with _alone_and_quiet():
        program = torch.onnx.export(
            request.model,
            args,
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(request, args, kwargs) if request.is_dynamic else None,
            opset_version=_opset(request),
            input_names=request.input_names,
            output_names=request.output_names,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=_weight_bytes(request.model) > _MAX_PROTOBUF_BYTES)


def _opset(request: ExportRequest) -> int | None:
    """The operator set asked for; for bfloat16 at least the first whose Conv takes it."""
    if request.opset is None and any(
        parameter.dtype is torch.bfloat16 for parameter in request.model.parameters()
    ):
        return _BFLOAT16_OPSET
    return request.opset


def _dynamic_shapes(request: ExportRequest, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Axis names in the structure of the forward's arguments, as torch.export wants them."""
    bound = inspect.signature(request.model.forward).bind(*args, **kwargs).arguments
    leaves, spec = pytree.tree_flatten(dict(bound))
    axes = iter(request.axes)
    return pytree.tree_unflatten(
        [(next(axes) or None) if isinstance(leaf, Tensor) else None for leaf in leaves], spec
    )


def _export_torchscript(request: ExportRequest, path: Path) -> None:
    args, kwargs = split_inputs(inputs_for_tracing(request))
    names = list(request.input_names or _argument_names(request.model, args, kwargs, request.axes))
    try:
        with _alone_and_quiet(), torch.no_grad():
            torch.onnx.export(
                _scriptable(request.model),
                (*args, kwargs) if kwargs else args,
                str(path),
                dynamo=False,
                opset_version=request.opset,
                input_names=names,
                output_names=request.output_names,
                dynamic_axes=dict(zip(names, request.axes, strict=False)),
            )
    except OSError:
        raise
    except Exception as error:
        raise ExportError(_reason("the TorchScript exporter", error, request)) from error


class _Wrapped(nn.Module):
    """A GraphModule inside a plain module: the TorchScript exporter mistakes its ``graph``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _scriptable(model: nn.Module) -> nn.Module:
    return _Wrapped(model) if isinstance(model, torch.fx.GraphModule) else model


def _argument_names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: Sequence[Any]
) -> list[str]:
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    names = []
    for name, value in bound.items():
        count = len(tensors_in(value))
        names += [name] if count == 1 else [f"{name}_{index}" for index in range(count)]
    return names if len(names) == len(axes) else [f"input_{index}" for index in range(len(axes))]


def _reason(tool: str, error: Exception, request: ExportRequest) -> str:
    hint = ""
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    if request.is_dynamic and any(w in text for w in ("ynamic", "onstraint", "pecializ")):
        hint = ". If the model's code depends on the batch or image size, pass " + (
            "dynamic_size=False" if request.dynamic_size else "dynamic_batch=False"
        )
    return f"{tool} cannot export the model: {text[:1500]}{hint}"


def _root_cause(error: BaseException) -> str:
    """The innermost reason in one line, without terminal codes: exporters wrap their errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def _alone_and_quiet() -> Iterator[None]:
    """One export at a time, without the exporters' output: the report says what matters."""
    with tracing_alone(), output_silenced(), warnings_ignored():
        yield


def _weight_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
