"""A patched model as the paper writes it: coordinates concatenated to every input.

Independent of the package's grids, padding and branch: only the weights are taken
over. Each group of a grouped convolution sees its own channels and the coordinates.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coordconv_patch as ccp


class ConcatConv2d(nn.Module):
    """conv([x ; c], [W ; W_c]) with c = (x, y) in [-1, 1], endpoints at pixel centres."""

    def __init__(self, layer: ccp.CoordConv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(_effective_weight(layer).detach().clone())
        self.coord_weight = nn.Parameter(layer.coord_weight.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding = layer.padding
        self.same = type(layer).__name__.endswith("Same")

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        column = _axis(width, x).view(1, 1, 1, width).expand(1, 1, height, width)
        row = _axis(height, x).view(1, 1, height, 1).expand(1, 1, height, width)
        coords = torch.cat((column, row), dim=1).expand(batch, 2, height, width)
        grouped = x.reshape(batch, self.groups, channels // self.groups, height, width)
        parts = [torch.cat((grouped[:, g], coords), dim=1) for g in range(self.groups)]
        inputs = torch.cat(parts, dim=1)
        padding = self.padding
        if self.same:
            inputs, padding = self._pad_same(inputs), (0, 0)
        weight = torch.cat((self.weight, self.coord_weight), dim=1)
        return F.conv2d(inputs, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _pad_same(self, x: Tensor) -> Tensor:
        """TensorFlow's SAME: ceil(length / stride) outputs, the odd pixel at the end."""
        amounts: list[int] = []
        for dim in (1, 0):
            length, step = x.shape[2 + dim], self.stride[dim]
            reach = (self.weight.shape[2 + dim] - 1) * self.dilation[dim] + 1
            total = max((math.ceil(length / step) - 1) * step + reach - length, 0)
            amounts += [total // 2, total - total // 2]
        return F.pad(x, amounts)


def _axis(length: int, like: Tensor) -> Tensor:
    if length == 1:
        return torch.zeros(1, dtype=like.dtype)
    return torch.linspace(-1, 1, length, dtype=like.dtype)


def _effective_weight(layer: ccp.CoordConv2d) -> Tensor:
    """The weight that reaches the convolution: standardised in NFNets (Brock et al. 2021)."""
    if "ScaledStdConv2d" not in type(layer).__name__:
        return layer.weight
    weight = layer.weight
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
    return (weight - mean) / (variance + layer.eps).sqrt() * layer.gain * layer.scale


def concatenating(patched: nn.Module) -> nn.Module:
    """A copy of a patched model with every CoordConv2d in its concatenating form."""
    model = copy.deepcopy(patched)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "coord_weight"):
                setattr(parent, name, ConcatConv2d(child))
    # Its weights, standardised ones for example, are not those of the published form.
    return ccp.forget_left_behind_(model)
