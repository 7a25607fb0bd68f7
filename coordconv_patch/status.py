"""The coordinate layers of a patched model, and what state each is in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.training import coord_parameters_of

__all__ = ["LayerStatus", "layer_status"]


@dataclass(frozen=True)
class LayerStatus:
    """One coordinate layer.

    Attributes:
        name: Its qualified name.
        kind: Class of the layer; ``"CoordBranch"`` for functional convolutions and for those
            of which only some calls have coordinates.
        coords: The convention of its coordinate channels.
        channels: Names of these channels, such as ``("x", "y")``.
        shape: Shape of the coordinate weight.
        dtype: Its dtype.
        device: Its device.
        is_trainable: Whether a training changes it (``requires_grad``).
        is_zero: Whether all of it is zero, as after patching.
        norm: Its Euclidean norm, in float64; NaN on the meta device.
        calls: Which of a convolution's calls have coordinates; ``None``: every one.
    """

    name: str
    kind: str
    coords: Coordinates
    channels: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_trainable: bool
    is_zero: bool
    norm: float
    calls: ChosenCalls | None


@torch.no_grad()
def layer_status(model: nn.Module) -> tuple[LayerStatus, ...]:
    """The coordinate layers of a model, in order of registration; none if it is not patched.

    Example:
        >>> from coordconv_patch import patch
        >>> status, = layer_status(patch(nn.Sequential(nn.Conv2d(3, 8, 3))))
        >>> status.name, status.kind, status.channels, status.is_zero
        ('0', 'CoordConv2d', ('x', 'y'), True)
    """
    return tuple(_status(name, layer) for name, layer in coord_layers(model).items())


def _status(name: str, layer: CoordLayer) -> LayerStatus:
    weight, coords = layer.coord_weight, layer.coords
    norm = float("nan") if weight.is_meta else weight.double().norm().item()
    return LayerStatus(
        name=name,
        kind=type(layer).__name__,
        coords=coords,
        channels=coords.channel_names(weight.dim() - 2),
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        device=weight.device,
        is_trainable=any(parameter.requires_grad for parameter in coord_parameters_of(layer)),
        is_zero=norm == 0,
        norm=norm,
        calls=layer.chosen_calls,
    )
