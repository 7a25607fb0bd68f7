"""What rounding alone does to a model's outputs: the same model, computed with other last digits.

A graph that a runtime has optimised adds up in another order than torch. How far that
may move the outputs is measured on the torch model itself: in float64, and in its own
precision with weights and inputs changed by a unit or two in the last place.
"""

from __future__ import annotations

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
"""Weights and inputs are moved by up to this many units in the last place."""


def rounding_noise(
    model: nn.Module, example_inputs: Any, outputs: Sequence[int] | None = None
) -> float:
    """How far the model's outputs move when it is computed in float64 instead.

    0 if it cannot be computed in float64. ``outputs`` are the numbers of those to
    look at; ``None``: all.
    """
    try:
        exact = _in_float64(model, example_inputs)
        own = torch_outputs(model, example_inputs)
        chosen = range(len(own)) if outputs is None else outputs
        return compare([exact[i] for i in chosen], [to_array(own[i]) for i in chosen])
    except Exception:
        return 0.0


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
    def jitter(tensor: Tensor) -> Tensor:
        signs = torch.rand(tensor.shape, generator=generator).mul_(2).sub_(1).to(tensor)
        return tensor + tensor * signs * (_LAST_PLACES * torch.finfo(tensor.dtype).eps)

    changed = copied(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.is_floating_point():
                parameter.copy_(jitter(parameter))
    return torch_outputs(changed, _map_floats(example_inputs, jitter))


def _map_floats(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda tensor: change(tensor) if tensor.is_floating_point() else tensor, values
    )
