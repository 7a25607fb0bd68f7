"""torch's two ONNX exporters: torch.export's, and TorchScript's where that one fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir
from torch import nn

from coordconv_patch.errors import ArgumentError, ExportError, excerpt, first_line
from coordconv_patch.export.axes import ExportRequest
from coordconv_patch.export.dynamo import export_dynamo
from coordconv_patch.export.opset import can_ask_for, require_opset
from coordconv_patch.export.torchscript import export_torchscript
from coordconv_patch.left_behind.watch import release_watches_
from coordconv_patch.running.silence import output_silenced, warnings_ignored
from coordconv_patch.running.torch_versions import onnx_exporter_hint
from coordconv_patch.running.tracing_gate import tracing_alone
from coordconv_patch.running.untouched import copied

__all__ = ["EXPORTERS", "Exported", "Exporter", "check_exporter", "evaluation_copy", "export_graph"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exporter:
    """One of torch's exporters: what messages call it, and what makes a graph, or raises."""

    title: str
    export: Callable[[nn.Module, ExportRequest], onnx_ir.Model]


EXPORTERS = {
    "dynamo": Exporter("torch.export", export_dynamo),
    "torchscript": Exporter("the TorchScript exporter", export_torchscript),
}
"""By name, in the order in which ``"auto"`` tries them."""


@dataclass(frozen=True)
class Exported:
    """A graph as an exporter made it; the exporter's name, and why those before it could not."""

    model: onnx_ir.Model
    exporter: str
    notes: tuple[str, ...]


def check_exporter(exporter: Any) -> None:
    """Raise an ArgumentError unless this is the name of an exporter, or ``"auto"``."""
    *others, last = map(repr, ("auto", *EXPORTERS))
    if not isinstance(exporter, str) or exporter not in ("auto", *EXPORTERS):
        raise ArgumentError(f"exporter={excerpt(exporter)}: write {', '.join(others)} or {last}")


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode and without gradients, for an exporter; or an ExportError."""
    evaluated = copied(model, ExportError, "an export works on a copy")
    release_watches_(evaluated)  # the export rewrites it, coordinates included
    for module in evaluated.modules():  # not eval(): models of torch.export refuse it
        module.training = False
    # With gradients, attention whose mask is trained (Swin, BEiT) takes another path through torch
    # than in the exporter's next step, which then meets strides that it cannot view.
    return evaluated.requires_grad_(False)


def export_graph(model: nn.Module, request: ExportRequest, exporter: str) -> Exported:
    """The graph of a model in evaluation mode, which holds the model's weights, not copies of them.

    ``exporter`` is a name of :data:`EXPORTERS`, or ``"auto"``: the first that can, in the operator
    set asked for.

    Raises:
        ExportError: If the exporters cannot make the graph, or not in the operator set asked for.
        OSError: If an exporter cannot write its files.
    """
    failures: list[tuple[str, Exception]] = []
    able = [name for name in EXPORTERS if can_ask_for(request.opset, name)]
    for name in able if exporter == "auto" else [exporter]:
        title = EXPORTERS[name].title
        try:
            # The report says what matters of the exporters' output.
            with tracing_alone(), output_silenced(), warnings_ignored():
                graph = EXPORTERS[name].export(model, request)
            require_opset(graph, request.opset, exporter)
        except OSError:  # a file cannot be written, so another exporter could not either
            raise
        except Exception as error:
            failures.append((title, error))
            _LOG.debug("%s", _note(title, error, request))
        else:
            notes = tuple(f"{_note(*each, request)}; {title} did" for each in failures)
            return Exported(graph, name, notes)
    raise ExportError("\n".join(_reason(*each, request) for each in failures)) from failures[0][1]


def _note(title: str, error: Exception, request: ExportRequest) -> str:
    """What a report says of an exporter's failure."""
    if isinstance(error, ExportError):
        return f"{title}'s exporter could not write operator set {request.opset} for this model"
    return f"{title} could not export it ({_root_cause(error)})"


def _reason(title: str, error: Exception, request: ExportRequest) -> str:
    """What an error says of it."""
    if isinstance(error, ExportError):
        return str(error)
    hint = onnx_exporter_hint() if title == EXPORTERS["dynamo"].title else ""
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    if request.is_dynamic and any(w in text for w in ("ynamic", "onstraint", "pecializ")):
        hint += ". If the model's code depends on the batch or image size, pass " + (
            "dynamic_size=False" if request.dynamic_size else "dynamic_batch=False"
        )
    if request.opset is not None:
        hint += f". If operator set {request.opset} is the reason, pass another opset=, or None"
    return f"{title} cannot export the model: {text[:1500]}{hint}"


def _root_cause(error: BaseException) -> str:
    """The innermost reason in one line, without terminal codes: exporters wrap their errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
