"""A layer that says the same at every place."""

from __future__ import annotations

from torch import Tensor, nn


class Tile(nn.Module):
    """Repeats numbers ``(N, C)`` over a map: ``(N, C, side, side)``, a view."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, numbers: Tensor) -> Tensor:
        return numbers[:, :, None, None].expand(-1, -1, self.side, self.side)
