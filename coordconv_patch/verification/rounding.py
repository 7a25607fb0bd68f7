"""What rounding alone does to a model's outputs: the same model, computed with other last digits.

A graph that a runtime has optimised adds up in another order than torch. How far that
may move the outputs is measured on the torch model itself: in float64, and in its own
precision with weights and inputs changed by a unit or two in the last place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coordconv_patch.running.untouched import LOOK

__all__ = ["in_float64", "other_roundings"]

_JITTERED_RUNS = 8
_LAST_PLACES = 2
"""Weights and inputs are moved by up to this many units in the last place."""

Run = Callable[[nn.Module, Any], list[Tensor]]
"""A model's output tensors on example inputs."""


def in_float64(run: Run, model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The outputs of a copy of the model in float64."""
    with LOOK:
        double = copy.deepcopy(model).double()
    return run(double, _map_floats(example_inputs, lambda tensor: tensor.double()))


def other_roundings(run: Run, model: nn.Module, example_inputs: Any) -> Iterator[list[Tensor]]:
    """The model's outputs with other rounding, one run at a time; in float64 first.

    The same ones at every call. The model is left as it is; a run that fails is left
    out, as not every model can be computed in float64.
    """
    generator = torch.Generator().manual_seed(0)
    for number in range(1 + _JITTERED_RUNS):
        try:
            if number == 0:
                outputs = in_float64(run, model, example_inputs)
            else:
                outputs = _jittered(run, model, example_inputs, generator)
        except Exception:
            continue
        yield outputs


def _jittered(
    run: Run, model: nn.Module, example_inputs: Any, generator: torch.Generator
) -> list[Tensor]:
    def jitter(tensor: Tensor) -> Tensor:
        signs = torch.rand(tensor.shape, generator=generator).mul_(2).sub_(1).to(tensor)
        return tensor + tensor * signs * (_LAST_PLACES * torch.finfo(tensor.dtype).eps)

    with LOOK:
        changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.is_floating_point():
                parameter.copy_(jitter(parameter))
    return run(changed, _map_floats(example_inputs, jitter))


def _map_floats(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda tensor: change(tensor) if tensor.is_floating_point() else tensor, values
    )
