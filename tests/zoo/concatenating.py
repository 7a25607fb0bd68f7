"""A patched model as the paper writes it, for any convolution class: coordinates as channels.

Independent of the package's grids, padding and branch. While a plain convolution runs
its own forward, coordinates of its input ride along: what that forward pads, they are
padded with, and the convolution that it calls gets them as further input channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

__all__ = ["concatenate_coordinates_"]

_CONVS = {F.conv1d, F.conv2d, F.conv3d}
_TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


def concatenate_coordinates_(model: nn.Module, coord_weights: Mapping[str, Tensor]) -> None:
    """Give the plain convolutions of a model coordinates, in place, by concatenation.

    Args:
        model: A plain model.
        coord_weights: By the qualified name of the convolution module.
    """
    for name, coord_weight in coord_weights.items():
        module = model.get_submodule(name)
        assert isinstance(module, _ConvNd)
        module.forward = functools.partial(_forward, module, coord_weight.detach())


def _forward(
    module: _ConvNd, coord_weight: Tensor, input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    with _Concatenation(module.groups, coord_weight, input) as mode:
        output = type(module).forward(module, input, *args, **kwargs)
    assert mode.convolved == 1, f"{type(module).__name__} convolved {mode.convolved} times"
    return output


class _Concatenation(TorchFunctionMode):
    def __init__(self, groups: int, coord_weight: Tensor, input: Tensor) -> None:
        super().__init__()
        self.groups = groups
        self.coord_weight = coord_weight
        self.input = input
        self.ndim = coord_weight.dim() - 2
        self.coords = _grid(input.shape[-self.ndim :], input)
        self.convolved = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        about_input = bool(args) and args[0] is self.input
        if func is F.pad and about_input:
            self.coords = F.pad(self.coords, *args[1:], **kwargs)
            self.input = func(*args, **kwargs)
            return self.input
        if func in _CONVS | _TRANSPOSED and about_input:
            self.convolved += 1
            return self._convolve(func, args[1], args[2:], kwargs)
        return func(*args, **kwargs)

    def _convolve(
        self, func: Callable[..., Any], weight: Tensor, rest: Any, kwargs: Mapping[str, Any]
    ) -> Tensor:
        batched = self.input.dim() == self.ndim + 2
        source = self.input if batched else self.input.unsqueeze(0)
        coords = self.coords.expand(source.shape[0], *self.coords.shape[1:])
        parts = [torch.cat((part, coords), 1) for part in source.chunk(self.groups, dim=1)]
        if func in _TRANSPOSED:  # (C_in, C_out / groups, ...), coordinates (K, C_out, ...)
            weights = [
                torch.cat(pair, 0)
                for pair in zip(
                    weight.chunk(self.groups, 0),
                    self.coord_weight.chunk(self.groups, 1),
                    strict=True,
                )
            ]
            widened = torch.cat(weights, 0)
        else:
            widened = torch.cat((weight, self.coord_weight), 1)
        output = func(torch.cat(parts, 1), widened, *rest, **kwargs)
        return output if batched else output.squeeze(0)


def _grid(size: Sequence[int], like: Tensor) -> Tensor:
    """(1, ndim, *size): x along the last dimension first; -1 and +1 at the outer pixels."""
    axes = []
    for dim in reversed(range(len(size))):
        length = size[dim]
        line = torch.linspace(-1, 1, length, dtype=torch.float64) if length > 1 else torch.zeros(1)
        shape = [1] * len(size)
        shape[dim] = length
        axes.append(line.view(shape).expand(*size))
    return torch.stack(axes).unsqueeze(0).to(like.dtype)
