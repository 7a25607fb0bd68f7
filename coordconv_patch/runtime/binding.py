"""Run a session on inputs and outputs that stay where it computes.

``session.run`` takes its inputs from main memory and brings the outputs back. On a
GPU these copies can take longer than the model, and they are the same for every
variant of it; bound values leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from coordconv_patch.errors import ExportError

__all__ = ["BoundRun", "device_of"]

_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


def device_of(provider: str) -> str:
    """Where an execution provider keeps its tensors, as ONNX Runtime names it.

    For a provider that is not known here that is the CPU: right, but with the copies in it.
    """
    return "cuda" if provider in _CUDA else "cpu"


class BoundRun:
    """A session with its inputs in place; calling it runs it, and returns when it is done.

    It runs once when it is made, to learn the outputs' shapes; every further run writes into
    the same outputs. The session's first provider decides the device.

    Raises:
        ExportError: If there is not one array per graph input, or the session fails on them.
    """

    def __init__(
        self, session: ort.InferenceSession, arrays: Sequence[np.ndarray[Any, Any]]
    ) -> None:
        names = [value.name for value in session.get_inputs()]
        if len(names) != len(arrays):
            raise ExportError(f"the graph has inputs {names}, but {len(arrays)} arrays were given")
        self.device = device_of(session.get_providers()[0])
        self._session = session
        self._binding = session.io_binding()
        # Kept: on the CPU they are views of the arrays, whose memory the binding does not hold.
        self._inputs = [ort.OrtValue.ortvalue_from_numpy(a, self.device, 0) for a in arrays]
        for name, value in zip(names, self._inputs, strict=True):
            self._binding.bind_ortvalue_input(name, value)
        outputs = [value.name for value in session.get_outputs()]
        for name in outputs:
            self._binding.bind_output(name, self.device, 0)
        try:
            self()
        except Exception as error:
            shapes = dict(zip(names, [array.shape for array in arrays], strict=True))
            raise ExportError(f"ONNX Runtime cannot run the graph on {shapes}: {error}") from error
        # The binding is not cleared in between: in ONNX Runtime 1.23 its outputs then dangle.
        self._outputs = self._binding.get_outputs()
        for name, value in zip(outputs, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def __call__(self) -> None:
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def outputs(self) -> list[np.ndarray[Any, Any]]:
        """What the last run gave, brought to main memory."""
        return [value.numpy() for value in self._outputs]
