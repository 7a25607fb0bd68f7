"""The tensors of a model as they are, to be put back after a look at it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from coordconv_patch.running.tensor_values import plain_parts, same_bits

__all__ = ["KeptGradients", "KeptTensors"]


class KeptTensors:
    """Tensors with their memory and their values.

    Both are needed. ``w.data = renormed`` gives a tensor other memory, and
    ``w.data.clamp_(-1, 1)`` writes into its own without counting in ``_version``, so nothing
    cheaper than a copy can tell whether the values are the same, or bring them back.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        once = {id(each): each for each in tensors}
        self._kept = [kept for each in once.values() for kept in _kept_parts(each)]

    def restore(self) -> None:
        """Put back what has changed since; what has not is not written to."""
        for tensor, memory, values in self._kept:
            # Fake tensors, for one, have no values: what cannot be compared has not changed.
            with torch.no_grad(), contextlib.suppress(NotImplementedError, RuntimeError):
                if _place_of(tensor) != _place_of(memory):
                    tensor.data = memory
                if not same_bits(tensor, values):
                    tensor.copy_(values)


def _kept_parts(tensor: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The ordinary tensors that a tensor is made of, each with its memory and its values."""
    if is_lazy(tensor) or tensor.is_meta:  # which have none
        return []
    try:
        parts = [part for _, part in plain_parts(tensor)]
        return [(part, part.data, part.detach().clone()) for part in parts]
    except (NotImplementedError, RuntimeError, TypeError):  # of a kind that torch lacks this for
        return []


def _place_of(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Where in memory a tensor lies, and how."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class KeptGradients:
    """The gradients of parameters, which are taken off while a model runs.

    A forward pass may run a backward pass, which would add to them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._kept = [(each, each.requires_grad, each.grad) for each in parameters if each.is_leaf]
        for parameter, _, gradient in self._kept:
            if gradient is not None:
                parameter.grad = None

    def restore(self) -> None:
        """Put them back."""
        for parameter, requires_grad, gradient in self._kept:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not gradient:
                parameter.grad = gradient
