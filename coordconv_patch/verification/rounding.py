"""What rounding alone does to a model's outputs: the same model, computed with other last digits.

A graph that a runtime has optimised adds up in another order than torch. How far that
may move the outputs is measured on the torch model itself: in float64, and in its own
precision with weights, inputs and what each layer gives out changed by a unit or two in the last
place. Layers' outputs are changed pixel by pixel, because weights are shared by all pixels: what
hangs on which of two pixels is the larger would else never change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coordconv_patch.running.untouched import copied
from coordconv_patch.verification.differences import compare, to_array
from coordconv_patch.verification.torch_run import torch_outputs

__all__ = ["other_roundings", "rounding_noise"]

_JITTERED_RUNS = 8
_LAST_PLACES = 2
"""Weights, inputs and layers' outputs are moved by up to this many units in the last place."""


def rounding_noise(expected: Sequence[Tensor], rounded: Sequence[Tensor]) -> float:
    """How far outputs move with another rounding; 0 if that is not a finite number.

    Args:
        expected: The model's outputs.
        rounded: The same outputs of one of :func:`other_roundings`.
    """
    moved = compare(expected, [to_array(tensor) for tensor in rounded])
    return moved if math.isfinite(moved) else 0.0


def other_roundings(model: nn.Module, example_inputs: Any) -> Iterator[list[Tensor]]:
    """The model's outputs with other rounding, one run at a time; in float64 first.

    The same ones at every call. The model is left as it is; a run that fails is left
    out, as not every model can be computed in float64.
    """
    generator = torch.Generator().manual_seed(0)
    for number in range(1 + _JITTERED_RUNS):
        try:
            if number == 0:
                outputs = _in_float64(model, example_inputs)
            else:
                outputs = _jittered(model, example_inputs, generator)
        except Exception:
            continue
        yield outputs


def _in_float64(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The outputs of a copy of the model in float64."""
    return torch_outputs(copied(model).double(), _map_floats(example_inputs, Tensor.double))


def _jittered(model: nn.Module, example_inputs: Any, generator: torch.Generator) -> list[Tensor]:
    def noise(tensor: Tensor) -> Tensor:
        signs = torch.rand(tensor.shape, generator=generator).mul_(2).sub_(1).to(tensor)
        return signs * (_LAST_PLACES * torch.finfo(tensor.dtype).eps)

    def jitter(tensor: Tensor) -> Tensor:
        return tensor + tensor * noise(tensor)

    def jitter_sum(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
            return None
        # A sum's rounding is as large as its terms are, also where they cancel.
        return output + (output.abs() + output.abs().mean()) * noise(output)

    changed = copied(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.is_floating_point():
                parameter.copy_(jitter(parameter))
    for module in changed.modules():
        if any(True for _ in module.parameters(recurse=False)):
            _hook(module, jitter_sum)
    return torch_outputs(changed, _map_floats(example_inputs, jitter))


def _hook(module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> None:
    if not isinstance(module, torch.jit.ScriptModule):  # whose hooks would have to be compiled
        module.register_forward_hook(hook)


def _map_floats(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda tensor: change(tensor) if tensor.is_floating_point() else tensor, values
    )
