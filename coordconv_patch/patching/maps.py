"""Give a patched model maps with a call: channels that no position tells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coordconv_patch.channels.given import Given
from coordconv_patch.errors import CoordinatesError, excerpt
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.capture import is_capturing, is_transforming
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.given_maps import given_blocks
from coordconv_patch.layers.places import maps_entered, shared_places

__all__ = ["maps"]


@contextmanager
def maps(model: nn.Module, **given: Tensor) -> Iterator[None]:
    """While entered, layers see these maps in the channels of :class:`coordconv_patch.Given`.

    They hold for the samples of the model's calls as :func:`coordconv_patch.places` do, beside
    which they can be entered: a map belongs to what the network is given, not to the whole picture.

    Args:
        model: A patched model whose convention has channels ``Given(name)``.
        **given: By name, shape ``(N, channels, H, W)``, one a sample or N = 1 for all; of any
            resolution. For signals ``(N, channels, L)``, for volumes ``(N, channels, D, H, W)``.

    Raises:
        PatchError: If the model is not patched; at a layer that sees another number of samples.
        CoordinatesError: If no layer has channels of a name, or a tensor is not one of finite
            floats of the right shape.

    Example:
        >>> coords = Coordinates(channels=(Axes(), Given("depth")))         # doctest: +SKIP
        >>> model = patch(model, coords=coords)                             # doctest: +SKIP
        >>> with maps(model, depth=depth):                                  # doctest: +SKIP
        ...     model(images)
    """
    layers = require_coord_layers(model)
    blocks = {block.name for layer in layers.values() for block in given_blocks(layer)}
    for name in given:
        if name not in blocks:
            raise CoordinatesError(
                f"maps {name!r}: no layer has channels Given({name!r}); there are "
                f"{sorted(blocks) or 'none'}"
            )
    seeing = {name: layer for name, layer in layers.items() if given_blocks(layer)}
    for site, layer in seeing.items():
        for block in given_blocks(layer):
            if block.name in given:
                _check(site, layer, block, given[block.name])
    with maps_entered(shared_places(seeing.values()), given):
        yield


def _check(site: str, layer: CoordLayer, block: Given, value: object) -> None:
    ndim = layer.coord_geometry.ndim
    sizes = ", ".join(("D", "H", "W")[3 - ndim :]) if ndim > 1 else "L"
    shape = f"(N, {block.channels}, {sizes})"
    if (
        not isinstance(value, Tensor)
        or not value.is_floating_point()
        or value.dim() != ndim + 2
        or value.shape[1] != block.channels
    ):
        what = (
            f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else excerpt(value)
        )
        raise CoordinatesError(
            f"maps {block.name}={what}: {site} needs a tensor of floats of shape {shape}"
        )
    if not (is_capturing() or is_transforming() or value.is_meta):
        with torch.no_grad():
            if not value.isfinite().all():
                raise CoordinatesError(
                    f"maps {block.name}: a number in it is not finite (NaN or infinity)"
                )
