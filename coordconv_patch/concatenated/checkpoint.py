"""Checkpoints of concatenating CoordConvs, whose weights have C + K input channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coordconv_patch.arguments import given
from coordconv_patch.errors import ArgumentError, WeightsError, listing
from coordconv_patch.graphs.functional import join_names
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.concatenated_weight import taken_apart
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.running.untouched import LOOK, copied

__all__ = ["load_concatenated", "load_concatenated_"]

Side = Literal["last", "first"]


def load_concatenated(
    model: nn.Module, state_dict: Mapping[str, Any], *, coordinates: Side = "last"
) -> nn.Module:
    """A copy of a patched model with the weights of a concatenating checkpoint.

    For a model that was patched where the other code concatenates: its first convolution has 3
    input channels and the checkpoint's has 5, RGB and x and y, say::

        model = ccp.load_concatenated(ccp.patch(resnet, "first", coords="solo"), state_dict)

    ``weight`` of a patched convolution is taken apart into ``weight`` and ``coord_weight``
    where it has C + K input channels; where it has C, the coordinate weight becomes zero.
    All else is loaded as ``load_state_dict(strict=True)`` does.

    Args:
        model: A patched model. The convention of its coordinates must be the checkpoint's, in
            which nothing says what it is; :func:`coordconv_patch.import_coordconv` reads it off
            the model that the checkpoint belongs to.
        state_dict: The checkpoint, by the names of the patched model.
        coordinates: Whether the coordinates are the weight's last or its first input channels.

    Returns:
        The copy.

    Raises:
        PatchError: If the model is not patched.
        WeightsError: If a name is missing or unknown, or a shape does not fit.
    """
    with LOOK:
        weights = _taken_apart(model, state_dict, coordinates)
        return _loaded(copied(model, advice="use load_concatenated_"), weights)


def load_concatenated_(
    model: nn.Module, state_dict: Mapping[str, Any], *, coordinates: Side = "last"
) -> nn.Module:
    """As :func:`load_concatenated`, in place; the model is unchanged after an error.

    Returns:
        The model itself.
    """
    with LOOK:
        return _loaded(model, _taken_apart(model, state_dict, coordinates))


def _loaded(model: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    model.load_state_dict(weights, strict=True)
    return model


def _taken_apart(
    model: nn.Module, state_dict: Mapping[str, Any], coordinates: Side
) -> dict[str, Any]:
    """A checkpoint as one of the patched model; raises WeightsError if it does not fit it."""
    if not isinstance(coordinates, str) or coordinates not in ("last", "first"):
        raise ArgumentError(f"{given('coordinates', coordinates)}: write 'last' or 'first'")
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(f"{given('state_dict', state_dict)}: pass a state_dict")
    require_coord_layers(model)
    weights, expected = dict(state_dict), model.state_dict()
    for name, layer in model.named_modules(remove_duplicate=False):
        key, own = join_names(name, "weight"), join_names(name, "coord_weight")
        weight = weights.get(key)
        if not isinstance(layer, CoordConvNd) or own in weights or not isinstance(weight, Tensor):
            continue
        if layer.groups == 1 and weight.shape == layer.concatenated_weight().shape:
            weights[key], weights[own] = taken_apart(
                weight,
                layer.in_channels,
                transposed=layer.transposed,
                is_first=coordinates == "first",
            )
        elif weight.shape == layer.weight.shape:
            weights[own] = torch.zeros_like(layer.coord_weight)
    _check(weights, expected)
    return weights


def _check(weights: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    # load_state_dict copies what fits before it says what does not.
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    shapes = [
        f"{key} has shape {tuple(weights[key].shape)}, the model needs {tuple(value.shape)}"
        for key, value in expected.items()
        if isinstance(value, Tensor)
        and isinstance(weights.get(key), Tensor)
        and weights[key].shape != value.shape
    ]
    problems = [
        *([f"missing: {listing(missing)}"] if missing else []),
        *([f"unknown: {listing(unknown)}"] if unknown else []),
        *shapes[:3],
    ]
    if problems:
        raise WeightsError(
            f"the checkpoint does not fit the patched model. {'; '.join(problems)}. Is every "
            "convolution patched that it has coordinates for, and with as many channels?"
        )
