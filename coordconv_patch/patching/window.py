"""Where in a larger image the input of a patched model lies."""

from __future__ import annotations

import dataclasses

from torch import nn

from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.window import Window

__all__ = ["set_window_"]


def set_window_(model: nn.Module, window: Window | None) -> nn.Module:
    """Tell every coordinate layer where in a larger image its input lies, in place.

    For inference on tiles: each tile then gets the coordinates that it has in the
    whole image.

    Args:
        model: A patched model.
        window: The tile's place; ``None``: the input is the whole image again.

    Returns:
        The model itself.

    Raises:
        PatchError: If the model is not patched.
        CoordinatesError: If a layer's convention knows no windows.
    """
    layers = require_coord_layers(model)
    changed = {
        name: dataclasses.replace(layer.coords, window=window) for name, layer in layers.items()
    }
    for name, layer in layers.items():
        layer.coords = changed[name]
    return model
