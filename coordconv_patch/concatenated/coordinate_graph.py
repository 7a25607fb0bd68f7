"""Coordinate channels as a graph of plain torch operations, which needs nothing of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.pixel_positions import pixel_positions
from coordconv_patch.running.tracing_gate import tracing_alone

__all__ = ["coordinate_graph"]

_SIZES = ((5, 4, 6), (7, 9, 3))
"""Sizes at which a graph is compared with the convention, last dimension first."""


@tracing_alone()
def coordinate_graph(
    coords: Coordinates, ndim: int, dtype: torch.dtype, *, joined: bool
) -> fx.GraphModule:
    """A module that appends coordinate channels to an image, or gives them alone.

    It pickles as generated code, and its copies compute on the image's device, at any size.

    Args:
        coords: The convention.
        ndim: Number of spatial dimensions.
        dtype: The dtype that is computed in; the result has the image's.
        joined: Whether the image's channels come before them: shape ``(N, C + K, *size)``;
            otherwise ``(1, K, *size)``.

    Raises:
        PatchError: If the graph does not give the convention's values.
    """
    channels = _Channels(coords, ndim, dtype, joined)
    graph = fx.Tracer().trace(channels)
    for node in graph.nodes:
        node.type = None  # torch 2.6 cannot pickle graphs with annotations that are strings
    module = fx.GraphModule({}, graph, "AppendCoordinates" if joined else "CoordinateChannels")
    for size in (tuple(reversed(lengths[:ndim])) for lengths in _SIZES):
        image = torch.zeros(2, 1, *size, dtype=dtype)
        expected = coords.grid(size, device="cpu", dtype=dtype)
        got = module(image)[0, int(joined) :]
        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-5, atol=1e-6):
            raise PatchError(f"coordinates {coords} cannot be written as plain torch operations")
    return module


class _Channels(nn.Module):
    """What is traced. No function that makes tensors from sizes: torch.fx cannot trace those."""

    def __init__(self, coords: Coordinates, ndim: int, dtype: torch.dtype, joined: bool) -> None:
        super().__init__()
        self.coords, self.ndim, self.dtype, self.joined = coords, ndim, dtype, joined

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones_like(x[:1, :1], dtype=self.dtype)
        size: tuple[Any, ...] = tuple(x.shape[2 + dim] for dim in range(self.ndim))
        indices = [one.cumsum(2 + dim) - 1 for dim in range(self.ndim)]
        positions = pixel_positions(size, self.coords.window, x.device, self.dtype, indices)
        grid = torch.cat(self.coords.values(positions), 1).to(x.dtype)
        if not self.joined:
            return grid
        return torch.cat([x, grid.expand(x.shape[0], *([-1] * (self.ndim + 1)))], 1)
