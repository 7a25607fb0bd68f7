"""Where torch's versions differ, and from which oldest version on each stand-in may go.

The oldest torch that the package runs on is :data:`OLDEST`. What a version cannot do is refused by
its name where it is asked for; what it calls otherwise, or lacks, is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import traceback
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "OLDEST",
    "TELLS_EXPORTS",
    "annotate_nodes",
    "annotations_are_kept",
    "as_captured_for_onnx",
    "at_least_float32",
    "default_device",
    "dynamic_axes",
    "is_exporting",
    "name_axes_",
    "onnx_exporter_hint",
    "set_dynamo_callback",
    "skip_in_dynamo",
    "strict_export_hint",
]

OLDEST = "2.6"

# Decided here and not in the functions, since torch.compile traces those.
TELLS_EXPORTS = hasattr(torch.compiler, "is_exporting")
"""Whether torch.export's strict way, which is dynamo's, is told from torch.compile."""
_HAS_ANNOTATE = hasattr(traceback, "annotate")
_BEFORE_2_9 = torch.__version__ < "2.9"

if torch.__version__ >= "2.14":
    is_exporting = torch.compiler.is_exporting
elif TELLS_EXPORTS:  # may go with torch 2.13

    def is_exporting() -> bool:
        """Whether torch.export is tracing. While it compiles, torch's own is always true."""
        return torch.compiler._is_exporting_flag

else:  # may go with torch 2.6

    def is_exporting() -> bool:
        """Whether torch.export is tracing; its strict way is not told from torch.compile."""
        return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


if _HAS_ANNOTATE:
    annotations_are_kept = is_exporting
else:  # may go with torch 2.9

    def annotations_are_kept() -> bool:
        """Whether torch.export is tracing, and in the way that keeps annotations of nodes.

        Before torch 2.10 its strict way, which is dynamo's, does not.
        """
        return is_exporting() and not torch.compiler.is_dynamo_compiling()


set_dynamo_callback = torch._C._dynamo.eval_frame.set_eval_frame
"""Sets what compiles the functions that are called, ``None``: nothing; returns what did before.
``torch.compiler.disable`` does so by functions of Python, which would be compiled themselves."""


def skip_in_dynamo(code: CodeType) -> None:
    """Let dynamo leave a function alone where it is the outermost; others inline it as ever.

    What ``torch._dynamo.eval_frame.skip_code`` does, without importing the compiler.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    if hasattr(dynamo, "skip_code"):  # may go with torch 2.6
        dynamo.skip_code(code)
    else:
        actions = dynamo._FrameAction
        strategy = dynamo._FrameExecStrategy(actions.SKIP, actions.DEFAULT)
        dynamo.set_code_exec_strategy(code, strategy)


def default_device() -> torch.device:
    """``torch.get_default_device()``, which before torch 2.9 knows nothing of ``with device:``."""
    if _BEFORE_2_9:
        for mode in reversed(_get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
            if isinstance(mode, DeviceContext):
                return torch.device(mode.device)
    return torch.get_default_device()


def dynamic_axes(axes: Sequence[Mapping[int, Any]]) -> Sequence[Mapping[int, Any]]:
    """Dynamic axes, by name, as ``torch.onnx.export`` takes them: before torch 2.9 without names.

    What is not a name stays. :func:`name_axes_` gives a graph the names.
    """
    if not _BEFORE_2_9:
        return axes
    return [
        {index: Dim.DYNAMIC if isinstance(name, str) else name for index, name in names.items()}
        for names in axes
    ]


def name_axes_(model: onnx_ir.Model, axes: Sequence[Mapping[int, Any]]) -> None:
    """Give the dynamic axes of a graph their names, in place, where the exporter has not."""
    if not _BEFORE_2_9:
        return
    names: dict[str | None, Any] = {}
    for value, wanted in zip(model.graph.inputs, axes, strict=False):
        for index, name in wanted.items():
            dim = None if value.shape is None else value.shape[index]
            if dim is not None and not isinstance(dim, int):
                names.setdefault(dim.value, name)
    values = [output for node in model.graph.all_nodes() for output in node.outputs]
    for value in (*model.graph.inputs, *values):
        if value.shape is None:
            continue
        shape = value.shape.copy()  # it may be frozen
        for index, dim in enumerate(shape):
            if not isinstance(dim, int) and dim.value in names:
                shape[index] = names[dim.value]
        value.shape = shape


def as_captured_for_onnx(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> nn.Module | ExportedProgram:
    """The model, before torch 2.9 its program: what ``torch.onnx.export`` is to be given.

    Older ones trace what torch.export cannot capture, which fixes axes, and say nothing.
    """
    if not _BEFORE_2_9:
        return model
    return torch.export.export(
        model, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
    )


def onnx_exporter_hint() -> str:
    """What to say where torch.export's ONNX exporter fails; empty from torch 2.9 on."""
    if not _BEFORE_2_9:
        return ""
    return f". The exporter of torch {torch.__version__} knows fewer operators than that of 2.9"


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """A floating dtype, or float32 where that is wider.

    ``torch.promote_types`` says the same, and may take its place with torch 2.7: the torch.export
    of 2.6 writes calls of it into programs, which then cannot be loaded.
    """
    return dtype if dtype is torch.float64 else torch.float32


def strict_export_hint() -> str:
    """What to say where annotations of a program are missing; empty from torch 2.10 on."""
    if _HAS_ANNOTATE:
        return ""
    return f"; the strict export of torch {torch.__version__} loses it, pass strict=False"


@contextmanager
def annotate_nodes(annotation: dict[str, Any]) -> Iterator[None]:
    """While entered, nodes that torch.export records hold these values in ``meta["custom"]``."""
    # Strict export lets dynamo see to it that annotations reach the graph; otherwise they
    # are taken over only where that is asked for.
    with traceback.preserve_node_meta(), _annotate(annotation):
        yield


if _HAS_ANNOTATE:
    _annotate = traceback.annotate
else:  # may go with torch 2.9

    @contextmanager
    def _annotate(annotation_dict: dict[str, Any]) -> Iterator[None]:
        meta = traceback.current_meta
        before = meta.get("custom")
        meta["custom"] = {**(before or {}), **annotation_dict}
        try:
            yield
        finally:
            if before is None:
                del meta["custom"]
            else:
                meta["custom"] = before
