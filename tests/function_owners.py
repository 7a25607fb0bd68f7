"""A module that calls F.conv2d itself, and what coordinates make of such a call.

The reference concatenates coordinates by hand; it shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coordconv_patch as ccp


def fill_(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_()
    return model


def concatenated(
    x: Tensor, weight: Tensor, coord_weight: Tensor, pad: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """A 3x3 CoordConv as the paper writes it; by default with one pixel of zeros around."""
    height, width = x.shape[2:]
    rows = torch.linspace(-1, 1, height).view(-1, 1).expand(height, width)
    columns = torch.linspace(-1, 1, width).expand(height, width)
    coords = torch.stack((columns, rows)).expand(len(x), 2, height, width)
    image = torch.cat((x, coords), dim=1)
    padded = F.pad(image, (1, 1, 1, 1)) if pad is None else pad(image)
    return F.conv2d(padded, torch.cat((weight, coord_weight), dim=1))


class Owner(nn.Module):
    """Calls F.conv2d by a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, 3, 3) / 3)
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, padding=1)
