"""The lowering ``"channels"``: conv([x ; c], [W ; W_c]), c constant; the published CoordConv."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import (
    CONV_FUNCTIONS,
    DECLARED,
    Call,
    pad_amounts,
    pad_by_axis,
)
from coordconv_patch.lowering.constants import CoordConstant
from coordconv_patch.lowering.lowering import Lowering, StoredCalls
from coordconv_patch.lowering.site import LoweringSite

__all__ = ["Channels"]


class Channels(Lowering):
    """One convolution, of an input and a weight that have the coordinates' channels too."""

    name = "channels"

    def obstacle(self, site: LoweringSite) -> str:
        if isinstance(site.layer, CoordConvNd):
            return ""
        return (
            f"is a functional convolution, which has no {self.name!r} lowering here: choose "
            "'branch' or 'map'"
        )

    def constant(self, site: LoweringSite, call: Call) -> CoordConstant:
        return site.channels(call)

    def forward(self, site: LoweringSite, stored: StoredCalls) -> Callable[..., Tensor]:
        layer = site.layer
        assert isinstance(layer, CoordConvNd)  # there is no obstacle
        return functools.partial(_channels_forward, layer, stored)


def _channels_forward(
    layer: CoordConvNd, stored: StoredCalls, input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    with _ConcatenateCoordinates(layer, stored.of(input).constant.tensor):
        return cast(Tensor, layer._plain_class.forward(layer, input, *args, **kwargs))


class _ConcatenateCoordinates(TorchFunctionMode):
    """While entered, the layer's convolution call gets the coordinates as further input channels.

    The class's own forward decides padding and weight (standardised, say), so it
    runs as it is; only the call that it makes in the end is widened.
    """

    def __init__(self, layer: CoordConvNd, grid: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.grid = grid
        self.function = CONV_FUNCTIONS[len(layer.kernel_size), layer.transposed]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not self.function:
            return func(*args, **(kwargs or {}))
        names = ("input", "weight", "bias", "stride", "padding")
        call = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        rest = args[len(names) :]
        input, weight = call.pop("input"), call.pop("weight")
        groups, ndim = self.layer.groups, len(self.layer.kernel_size)
        batched = input.dim() == ndim + 2
        input = input if batched else input.unsqueeze(0)
        if "padding" in call and input.shape[2:] != self.grid.shape[2:]:
            # The forward leaves some of its padding to the convolution; the grid has it all.
            input, call["padding"] = self._padded(input, call["padding"]), 0
        grid = self.grid.expand(input.shape[0], *self.grid.shape[1:])
        coord_weight: Tensor = self.layer.coord_weight
        if groups > 1:
            input = _with_coordinates_in_each_group(input, grid, groups)
            if self.layer.transposed:
                coord_weight = _spread_over_groups(coord_weight, groups)
                weight = weight.reshape(groups, -1, *weight.shape[1:])
                weight = torch.cat((weight, coord_weight), dim=1).flatten(0, 1)
        else:
            input = torch.cat((input, grid), dim=1)
            if self.layer.transposed:
                weight = torch.cat((weight, coord_weight), dim=0)
        if not self.layer.transposed:
            weight = torch.cat((weight, coord_weight), dim=1)
        positional = [call.pop(name) for name in names[2:]] if rest else []
        output = func(input, weight, *positional, *rest, **call)
        return output if batched else output.squeeze(0)

    def _padded(self, input: Tensor, padding: str | int | Sequence[int]) -> Tensor:
        ndim = input.dim() - 2
        own: Any = (padding,) * ndim if isinstance(padding, int) else padding
        geometry = dataclasses.replace(self.layer.coord_geometry, padding=own)
        amounts = pad_amounts(DECLARED, input.shape[2:], geometry)
        return pad_by_axis(input, amounts, ("zeros",) * ndim)


def _with_coordinates_in_each_group(input: Tensor, grid: Tensor, groups: int) -> Tensor:
    """(N, C, ...) to (N, groups * (C / groups + K), ...): each group sees the coordinates last."""
    grouped = input.reshape(input.shape[0], groups, -1, *input.shape[2:])
    repeated = grid.unsqueeze(1).expand(-1, groups, *grid.shape[1:])
    return torch.cat((grouped, repeated), dim=2).flatten(1, 2)


def _spread_over_groups(coord_weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's (K, C_out, ...) to (groups, K, C_out / groups, ...)."""
    channels = coord_weight.shape[0]
    return coord_weight.reshape(channels, groups, -1, *coord_weight.shape[2:]).transpose(0, 1)
