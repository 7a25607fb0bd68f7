"""The common ports of CoordConv, re-implemented for comparison: they concatenate coordinates.

``RuntimeCoords`` follows mkocabas/CoordConv-pytorch, the port that most others copy: channels
made of integer products and sums at every call. ``BufferCoords`` is what people write who care
for speed: the channels of one size, kept in a buffer. Both widen the convolution's weight.

A grouped convolution gets the coordinates in each group (the ports themselves refuse it, as
C + 2 channels do not divide into the groups).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

__all__ = ["BufferCoords", "PortedConv2d", "RuntimeCoords", "ported"]


class RuntimeCoords(nn.Module):
    """(N, C, H, W) to (N, 2, H, W): row and column in [-1, 1], computed at every call."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        row_ones = torch.ones(1, 1, 1, width, dtype=torch.int32, device=x.device)
        column_ones = torch.ones(1, 1, 1, height, dtype=torch.int32, device=x.device)
        row_range = torch.arange(height, dtype=torch.int32, device=x.device)
        column_range = torch.arange(width, dtype=torch.int32, device=x.device)
        rows = torch.matmul(row_range[None, None, :, None], row_ones)
        columns = torch.matmul(column_range[None, None, :, None], column_ones).permute(0, 1, 3, 2)
        # A length of 1 divides by zero in the port; not here, to compare times and not NaNs.
        rows = rows.to(x.dtype) / max(height - 1, 1) * 2 - 1
        columns = columns.to(x.dtype) / max(width - 1, 1) * 2 - 1
        return torch.cat((rows, columns), dim=1).repeat(batch, 1, 1, 1)


class BufferCoords(nn.Module):
    """(N, C, H, W) to (N, 2, H, W): column and row in [-1, 1], kept for each size once seen."""

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        name = f"coords_{height}_{width}"
        if not hasattr(self, name):
            columns = torch.linspace(-1, 1, width).expand(1, 1, height, width)
            rows = torch.linspace(-1, 1, height)[:, None].expand(1, 1, height, width)
            self.register_buffer(name, torch.cat((columns, rows), dim=1), persistent=False)
        return getattr(self, name).expand(batch, -1, -1, -1)


class PortedConv2d(nn.Module):
    """A convolution whose input gets coordinates as two further channels in each group."""

    def __init__(self, conv: nn.Conv2d, coords: nn.Module) -> None:
        super().__init__()
        self.coords = coords
        self.conv = nn.Conv2d(
            conv.in_channels + 2 * conv.groups,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
        )
        with torch.no_grad():
            self.conv.weight[:, : conv.weight.shape[1]] = conv.weight
            self.conv.weight[:, conv.weight.shape[1] :] = 1e-3
            if conv.bias is not None:
                self.conv.bias.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        groups = self.conv.groups
        coords = self.coords(x)
        if groups > 1:
            x = x.reshape(batch, groups, channels // groups, height, width)
            coords = coords.unsqueeze(1).expand(batch, groups, 2, height, width)
            joined = torch.cat((x, coords), dim=2)
            return self.conv(joined.reshape(batch, channels + 2 * groups, height, width))
        return self.conv(torch.cat((x, coords), dim=1))


def ported(
    model: nn.Module, names: Collection[str], coords: Callable[[], nn.Module], example: Tensor
) -> nn.Module:
    """A copy with the named convolutions in a port's form.

    Args:
        model: The plain model.
        names: Qualified names of its nn.Conv2d.
        coords: ``RuntimeCoords`` or ``BufferCoords``.
        example: (N, 3, H, W); it is run once, which fills the buffers.
    """
    made = copy.deepcopy(model)
    for name in names:
        conv = made.get_submodule(name)
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{name} is no nn.Conv2d but {type(conv).__name__}")
        parent, _, child = name.rpartition(".")
        port = PortedConv2d(conv, coords()).train(conv.training)
        setattr(made.get_submodule(parent), child, port)
    with torch.no_grad():
        made(example)
    return made
