"""What the torch model gives on one input, in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coordconv_patch.running.inputs import as_plain_dict, run_model, tensors_in, writable_inputs
from coordconv_patch.running.untouched import evaluation
from coordconv_patch.verification.detections import Fields, find_fields

__all__ = ["TorchRun", "run_torch", "torch_outputs"]


@dataclass(frozen=True)
class TorchRun:
    """The output tensors of a run, in pytree order, and which are detections, by picture."""

    tensors: list[Tensor]
    fields: tuple[Fields, ...]


def run_torch(model: nn.Module, example_inputs: Any) -> TorchRun:
    """The model's outputs in evaluation mode; a PatchError if it fails on these inputs."""
    with evaluation(model):
        outputs = as_plain_dict(run_model(model, writable_inputs(example_inputs)))
    return TorchRun(tensors_in(outputs), find_fields(outputs))


def torch_outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The model's output tensors in evaluation mode, in pytree order."""
    return run_torch(model, example_inputs).tensors
