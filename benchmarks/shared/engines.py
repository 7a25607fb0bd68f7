"""Run an ONNX file on the CPU: ONNX Runtime, or OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from coordconv_patch.runtime.binding import BoundRun
from coordconv_patch.runtime.providers import CPU, make_session

__all__ = ["ENGINES", "LOWERINGS", "onnxruntime_run", "openvino_run"]


def onnxruntime_run(path: Path, images: Tensor, threads: int) -> Callable[[], Any]:
    """A function that runs the file once in ONNX Runtime's CPU provider."""
    optimised = path.suffix == ".optimised"
    session = make_session(
        path.read_bytes() if optimised else path,
        [CPU],
        threads=threads,
        graph_optimization=not optimised,
        rests_between_runs=True,
    )
    return BoundRun(session, [images.numpy()])


def openvino_run(path: Path, images: Tensor, threads: int) -> Callable[[], Any]:
    """A function that runs the file once in OpenVINO's CPU plugin, at the images' size.

    In float32, like ONNX Runtime: by itself the plugin takes bfloat16 where the processor has it.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(images.shape))
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(images.numpy()))
    return request.infer


ENGINES: dict[str, Callable[[Path, Tensor, int], Callable[[], Any]]] = {
    "onnxruntime": onnxruntime_run,
    "openvino": openvino_run,
}

LOWERINGS: dict[str, str] = {"onnxruntime": "auto", "openvino": "branch"}
"""What files are lowered to for each engine: "auto" writes for ONNX Runtime's own fusions."""
