"""Tell a patched model which part of a picture each sample of a batch is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.errors import CoordinatesError
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.capture import is_capturing, is_transforming
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.place_of import check_takes_places, theta_of
from coordconv_patch.layers.places import entered, shared_places
from coordconv_patch.layers.window import Window

__all__ = ["check_places", "places", "set_places_"]


@contextmanager
def places(model: nn.Module, theta: Tensor | Any | Window | Sequence[Window]) -> Iterator[None]:
    """While entered, samples are parts of larger pictures, and see coordinates of the whole ones.

    A place says which part, as in :func:`torch.nn.functional.affine_grid`: with (x, y) a
    position in the network's input, -1 and 1 at its outer pixel edges, ``theta @ (x, y, 1)`` is
    the position in the whole picture, in the same terms. It can tell of crops (beyond the
    picture too, and of fractions of pixels), tiles, the padding of a batch, letterboxes, flips and
    rotations. Every coordinate layer of the model follows. At coordinate weights of zero outputs
    stay what they are, to the last bit.

    Each thread has its own places, and so has each asyncio task; a task, and a call of
    ``asyncio.to_thread``, begins with those of the code that began it. Those that a generator
    enters hold for its caller too until they are left. Gradient checkpointing sees those of the
    first run when it runs layers again, also after the context was left. Under torch.compile,
    places are inputs of the compiled graph: other numbers do not compile it again.

    Args:
        model: A patched model, also as DistributedDataParallel and torch.compile wrap it.
        theta: Shape (N, 2, 3), one place a sample, rows and columns in the order x, y; (1, 2, 3)
            or (2, 3) for all samples; for signals (N, 1, 2) and for volumes (N, 3, 4). Or a
            :class:`Window`, or a list of Windows, one a sample. It may require gradients.

    Raises:
        PatchError: If the model is not patched; at a layer that sees another number of samples.
        CoordinatesError: If theta is something else, its dimensions are not those of a layer, a
            number is not finite or a scale is zero, or a layer's convention has a window already
            or ``swap_sizes``.

    Example:
        >>> with coordconv_patch.places(model, coordconv_patch.Window((0, 224), (224, 224), (448, 448))):
        ...     model(top_right_tile)                                        # doctest: +SKIP
    """  # noqa: E501
    layers = require_coord_layers(model)
    given = check_places(layers, theta)
    with entered(shared_places(layers.values()), given):
        yield


def set_places_(
    model: nn.Module, theta: Tensor | Any | Window | Sequence[Window] | None
) -> nn.Module:
    """Tell a model which parts of larger pictures samples are from now on, in place.

    As :func:`places`, for every thread and until it is told otherwise. Copies and pickles of the
    model keep it; a ``state_dict`` does not.

    Args:
        model: A patched model.
        theta: As there; ``None``: samples are whole pictures again.

    Returns:
        The model itself.

    Raises:
        PatchError: As :func:`places`.
        CoordinatesError: As :func:`places`.
    """
    layers = require_coord_layers(model)
    given = None if theta is None else check_places(layers, theta)
    for shared in shared_places(layers.values()):
        shared.lasting = given
    return model


def check_places(layers: Mapping[str, CoordLayer], theta: Any) -> Tensor:
    """Places as a tensor (N, d, d + 1) that suits every layer.

    Raises:
        CoordinatesError: As :func:`places`.
    """
    given = theta_of(theta)
    ndim = given.shape[1]
    for name, layer in layers.items():
        if layer.coord_geometry.ndim != ndim:
            raise CoordinatesError(
                f"places of {ndim} dimensions, but {name} has {layer.coord_geometry.ndim}: its "
                f"places are tensors of shape (N, {layer.coord_geometry.ndim}, "
                f"{layer.coord_geometry.ndim + 1})"
            )
        check_takes_places(name, layer)
    if not (is_capturing() or is_transforming() or given.is_meta):
        with torch.no_grad():
            _check_values(given)
    return given


def _check_values(theta: Tensor) -> None:
    if not theta.isfinite().all():
        raise CoordinatesError("places: a number in theta is not finite (NaN or infinity)")
    if (theta[:, :, :-1] == 0).all(-1).any():
        raise CoordinatesError(
            "places: a row of theta is zero but for its last number, so the sample would be a "
            "part of the picture without any extent; the place of the whole picture is "
            "[[1, 0, 0], [0, 1, 0]]"
        )
