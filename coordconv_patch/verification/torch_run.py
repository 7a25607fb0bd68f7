"""What the torch model gives on one input, in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coordconv_patch.running.inputs import as_plain_dict, run_model, tensors_in
from coordconv_patch.running.untouched import evaluating
from coordconv_patch.verification.detections import Fields, find_fields

__all__ = ["TorchRun", "run_torch", "torch_outputs"]


@dataclass(frozen=True)
class TorchRun:
    """What the torch model gave on one input.

    Attributes:
        tensors: The output tensors, in pytree order.
        fields: Which of them are detections, one entry a picture.
    """

    tensors: list[Tensor]
    fields: tuple[Fields, ...]


def run_torch(model: nn.Module, example_inputs: Any) -> TorchRun:
    """The model's outputs in evaluation mode.

    Raises:
        PatchError: If the model fails on these inputs.
    """
    with evaluating(model):
        outputs = as_plain_dict(run_model(model, example_inputs))
    return TorchRun(tensors_in(outputs), find_fields(outputs))


def torch_outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The model's output tensors in evaluation mode, in pytree order."""
    return run_torch(model, example_inputs).tensors
