"""Which of ONNX Runtime's execution providers really work on this machine.

``onnxruntime.get_available_providers()`` lists what the package was built with:
onnxruntime-gpu names TensorRT and CUDA on machines without a GPU too, and
asking for them there prints pages of errors before it falls back to the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

import onnx
import onnxruntime as ort
import torch

from coordconv_patch.arguments import check_names
from coordconv_patch.errors import ArgumentError, ExportError, listing, path_text
from coordconv_patch.running.silence import descriptors_silenced

__all__ = ["CPU", "make_session", "probe_model", "working_providers"]

CPU = "CPUExecutionProvider"

_COMPUTES_NOTHING = frozenset({"AzureExecutionProvider"})
"""It only calls models on servers; the nodes of a graph run on the CPU beside it. onnxruntime's
wheels list it before the CPU, and a session on it says that it is what it runs on."""


def working_providers(requested: Sequence[str] | None = None) -> tuple[str, ...]:
    """The execution providers that load here, best first; the CPU's is always last.

    Args:
        requested: Names to choose from, in order of preference; ``None``: all that
            ONNX Runtime was built with, in its own order.

    Raises:
        ArgumentError: If a requested provider is unknown to this build of ONNX Runtime.
        ExportError: If none of the requested ones works.
    """
    check_names("providers", requested)
    built_in = ort.get_available_providers()
    if requested is None:
        return (*(name for name in built_in if name != CPU and _works(name)), CPU)
    unknown = [name for name in requested if name not in built_in]
    if unknown:
        raise ArgumentError(
            f"providers={list(requested)}: this ONNX Runtime has no {listing(unknown)}; "
            f"it has {listing(built_in)}"
        )
    working = tuple(name for name in requested if name == CPU or _works(name))
    if not working:
        raise ExportError(
            f"none of providers={list(requested)} works here (is there a GPU, and are its "
            f"libraries installed?); {CPU} always does"
        )
    return working


def make_session(
    model: str | os.PathLike[str] | bytes,
    providers: Sequence[str],
    *,
    threads: int = 0,
    disabled_optimizers: Sequence[str] = (),
    graph_optimization: bool = True,
    rests_between_runs: bool = False,
) -> ort.InferenceSession:
    """An ONNX Runtime session that is quiet about what it cannot load.

    Args:
        model: The file, or its bytes.
        providers: Execution providers, best first; see :func:`working_providers`.
        threads: Threads within an operator; 0: ONNX Runtime's choice.
        disabled_optimizers: Names of graph optimizers to leave out.
        graph_optimization: Whether to optimise the graph at all.
        rests_between_runs: Its threads stop spinning when a run ends, and not a while after
            it. For sessions that take turns: a spinning thread of one takes a core from the
            other, which made it five times as slow here.

    Raises:
        ExportError: If ONNX Runtime cannot load the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if rests_between_runs:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if not graph_optimization:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else os.fspath(model)
    disabled = {"disabled_optimizers": list(disabled_optimizers)} if disabled_optimizers else {}
    try:
        return ort.InferenceSession(source, options, providers=list(providers), **disabled)
    except Exception as error:
        name = "the model" if isinstance(source, bytes) else source
        raise ExportError(
            f"ONNX Runtime cannot load {path_text(name)}: {path_text(error)}"
        ) from error


@functools.cache
def _works(provider: str) -> bool:
    """Whether a session on this provider alone really runs on it."""
    if provider in _COMPUTES_NOTHING:
        return False
    if torch.cuda.is_available() and hasattr(ort, "preload_dlls"):
        # torch's own CUDA and cuDNN libraries, so that the user need not install them twice.
        with contextlib.suppress(Exception), descriptors_silenced():
            ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with descriptors_silenced():
        try:
            session = ort.InferenceSession(probe_model(), options, providers=[provider])
        except Exception:
            return False
    return bool(session.get_providers()[0] == provider)


def probe_model(opset: int = 17) -> bytes:
    """A file of one node, in an IR version that every operator set goes with."""
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    model = onnx.parser.parse_model(
        f"{header} probe (float[1] x) => (float[1] y) {{ y = Relu(x) }}"
    )
    return bytes(model.SerializeToString())
