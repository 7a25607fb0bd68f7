"""What coordinates and geometry alone determine, made once for all sites of a model.

Sites that differ in nothing but their weights get the same tensors, which the graph then stores
once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import Call, ConvGeometry, Padding
from coordconv_patch.lowering.basis import SeparableBasis, factors, separable_basis
from coordconv_patch.lowering.constants import CoordConstant
from coordconv_patch.lowering.layer_call import map_of, padded_grid_of
from coordconv_patch.lowering.strips import Strip, banded_strip, flat_strip

__all__ = ["ImageCache"]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _MapKey:
    """What the maps of a call depend on besides the weight."""

    coords: Coordinates
    padding: Padding
    geometry: ConvGeometry
    call: Call
    device: torch.device


@dataclass(frozen=True)
class _GridKey:
    """What padded coordinate channels depend on, whatever the rest of the geometry."""

    coords: Coordinates
    padding: Padding
    padding_mode: str
    input_size: tuple[int, ...]
    padded_size: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class ImageCache:
    """Keeps what is made for one site for the others of the same model."""

    def __init__(self) -> None:
        self._bases: dict[_MapKey, SeparableBasis | None] = {}
        self._flat_strips: dict[SeparableBasis, Strip] = {}
        self._banded_strips: dict[SeparableBasis, Strip] = {}
        self._coefficients: dict[tuple[Strip, torch.dtype], Tensor] = {}
        self._stored_strips: dict[tuple[Strip, torch.dtype], CoordConstant] = {}
        self._grids: dict[_GridKey, CoordConstant] = {}

    def basis(self, layer: CoordLayer, call: Call) -> SeparableBasis | None:
        """The images that a layer's maps are made of in one call, ``None`` if there are none."""
        geometry = dataclasses.replace(
            layer.coord_geometry, in_channels=0, out_channels=0, groups=1
        )
        device = layer.coord_weight.device
        key = _MapKey(layer.coords, layer.coord_padding, geometry, call, device)
        return _once(self._bases, key, lambda: _basis(layer, call))

    def flat_strip(self, basis: SeparableBasis) -> Strip:
        """A basis's images side by side."""
        return _once(self._flat_strips, basis, lambda: flat_strip(basis))

    def banded_strip(self, basis: SeparableBasis) -> Strip:
        """A basis's images in bands, where that takes fewer multiplications."""
        return _once(self._banded_strips, basis, lambda: banded_strip(basis))

    def coefficients(self, basis: SeparableBasis, strip: Strip, dtype: torch.dtype) -> Tensor:
        """How much of each tap is in each place of a strip, shape (T, bands * S)."""
        return _once(
            self._coefficients,
            (strip, dtype),
            lambda: strip.kernel(basis.coefficients).flatten(1).to(dtype),
        )

    def stored_strip(self, strip: Strip, dtype: torch.dtype) -> CoordConstant:
        """A strip as a graph holds it."""
        return _once(
            self._stored_strips,
            (strip, dtype),
            lambda: CoordConstant(strip.tensor(dtype), strip.factors(dtype), strip),
        )

    def grid(self, layer: CoordLayer, call: Call) -> CoordConstant:
        """The coordinate channels of one call, padded where the layer pads by itself."""
        grid = padded_grid_of(layer, call)
        key = _GridKey(
            coords=layer.coords,
            padding=layer.coord_padding,
            padding_mode=layer.coord_geometry.padding_mode,
            input_size=call.input_size,
            padded_size=tuple(grid.shape[2:]),
            dtype=grid.dtype,
            device=grid.device,
        )
        return _once(self._grids, key, lambda: _stored_grid(grid))


def _once(kept: dict[_Key, _Value], key: _Key, make: Callable[[], _Value]) -> _Value:
    if key not in kept:
        kept[key] = make()
    return kept[key]


def _stored_grid(grid: Tensor) -> CoordConstant:
    vectors = factors(grid)
    return CoordConstant(grid, None if vectors is None else (vectors,))


@torch.no_grad()
def _basis(layer: CoordLayer, call: Call) -> SeparableBasis | None:
    """The basis of the maps of all taps, each tap's with a weight of one."""
    geometry, device = layer.coord_geometry, layer.coord_weight.device
    channels = layer.coords.num_channels(geometry.ndim)
    num_taps = channels * torch.Size(geometry.kernel_size).numel()
    taps = torch.eye(num_taps, dtype=torch.float64, device=device)
    taps = taps.reshape(num_taps, channels, *geometry.kernel_size)
    responses = map_of(layer, call, taps.transpose(0, 1) if geometry.transposed else taps)
    per_channel = num_taps // channels
    return separable_basis(responses[0], [tap // per_channel for tap in range(num_taps)])
