"""What trained coordinate weights do: how much each site uses them, and the model without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.training import coord_parameters

__all__ = ["coordinate_maps", "shares", "switched_off"]


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Set every coordinate weight of a patched model to zero, for the time of the block."""
    kept = [(weight, weight.detach().clone()) for weight in coord_parameters(model)]
    try:
        for weight, _ in kept:
            nn.init.zeros_(weight)
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)


@torch.no_grad()
def coordinate_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What the coordinates add to each patched convolution's output.

    Maps of shape ``(C_out, H', W')`` by site name, in order of execution.
    """
    return {name: branch for name, (branch, _) in _observe(model, images).items()}


@torch.no_grad()
def shares(model: nn.Module, images: Tensor) -> dict[str, float]:
    """How much of each patched convolution's output comes from the coordinates.

    The standard deviation over positions of what the coordinates add, over the
    standard deviation over positions and images of what the picture gives; both as
    root mean squares over the output channels. By site name, in order of execution; 0: the
    coordinates are not used.
    """
    shares = {}
    for name, (branch, output) in _observe(model, images).items():
        from_picture = (output - branch).var(dim=(0, 2, 3)).mean()
        from_place = branch.var(dim=(1, 2)).mean()
        shares[name] = float((from_place / from_picture).sqrt())
    return shares


def _observe(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Each site's coordinate map ``(C_out, H', W')`` and output ``(N, C_out, H', W')``."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str, layer: CoordConvNd, inputs: tuple[Any, ...], output: Tensor) -> None:
        branch = layer.compute_branch(inputs[0].shape[2:], ())
        # A copy: an activation after the convolution may work in place.
        seen[name] = branch[0], output.clone()

    with ExitStack() as hooks:
        for name, layer in coord_layers(model).items():
            assert isinstance(layer, CoordConvNd)
            handle = layer.register_forward_hook(
                lambda module, inputs, output, name=name: record(name, module, inputs, output)
            )
            hooks.callback(handle.remove)
        model(images)
    return seen
