"""What a user may write for the places of samples, as one tensor; which layers take places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coordconv_patch.errors import CoordinatesError, excerpt
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.window import Window

__all__ = ["check_takes_places", "theta_of"]

_HINT = (
    "write a tensor of shape (N, 2, 3) as for torch.nn.functional.affine_grid, a Window, or a "
    "list of Windows, one a sample"
)


def theta_of(places: Any) -> Tensor:
    """Places as a tensor of shape (N, d, d + 1), one place a sample or one for all.

    Args:
        places: A tensor or array of that shape, or (d, d + 1) for all samples; a
            :class:`~coordconv_patch.Window`, or a list of them.

    Raises:
        CoordinatesError: If it is something else, or a number in it is not finite.
    """
    if isinstance(places, Window):
        places = [places]
    if isinstance(places, Sequence) and places and all(isinstance(w, Window) for w in places):
        if len({len(window.size) for window in places}) > 1:
            raise CoordinatesError("places: the windows have different numbers of dimensions")
        return torch.stack([window.theta() for window in places])
    theta = torch.from_numpy(places) if isinstance(places, np.ndarray) else places
    if not isinstance(theta, Tensor):
        raise CoordinatesError(f"places={excerpt(places)}: {_HINT}")
    if not theta.is_floating_point():
        raise CoordinatesError(f"places: a tensor of {theta.dtype}: {_HINT}, of floats")
    if theta.dim() == 2:
        theta = theta.unsqueeze(0)
    if theta.dim() != 3 or theta.shape[2] != theta.shape[1] + 1 or not 1 <= theta.shape[1] <= 3:
        raise CoordinatesError(f"places: a tensor of shape {tuple(places.shape)}: {_HINT}")
    return theta


def check_takes_places(name: str, layer: CoordLayer) -> None:
    """Check that a layer's convention can be placed.

    Raises:
        CoordinatesError: If it has a window already, or ``swap_sizes``.
    """
    if layer.coords.window is not None:
        raise CoordinatesError(
            f"{name} has a window already, {layer.coords.window}: take it away by "
            "set_window_(model, None), and give places instead"
        )
    if layer.coords.swap_sizes:
        raise CoordinatesError(
            f"{name} has swap_sizes, which reproduces the released reference code; that "
            "knows no places"
        )
