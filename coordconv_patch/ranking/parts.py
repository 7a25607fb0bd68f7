"""What is ranked: the sites of a patched copy, or stages of them, in order of execution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coordconv_patch.arguments import given
from coordconv_patch.errors import ArgumentError, PatchError
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.ranking.probe import Loss
from coordconv_patch.running.losses import loss_of
from coordconv_patch.running.uncompiled import uncompiled
from coordconv_patch.running.untouched import state_restored
from coordconv_patch.sites.stages import stages_of

__all__ = ["By", "Part", "parts_of", "reached_sites"]

By = Literal["site", "stage"]

_MOST = 16
"""Sites are ranked alone if they are so many at most, and stages are no more."""


@dataclass(frozen=True)
class Part:
    """A site or a stage.

    Attributes:
        name: Of the site, or what the sites' names begin with.
        sites: Names of its sites, in order of execution.
        input_size: Spatial size of what its first site saw first, such as ``(H, W)``.
        parameters: Coordinate weights that patching it adds.
    """

    name: str
    sites: tuple[str, ...]
    input_size: tuple[int, ...]
    parameters: int


def reached_sites(
    patched: nn.Module, layers: dict[str, CoordLayer], loss: Loss, batch: Any
) -> dict[str, tuple[int, ...]]:
    """Which layers run while the loss of a batch is computed, in order.

    Returns:
        By site the spatial size of what it sees first, such as ``(H, W)``.

    Raises:
        PatchError: If none does, or if the loss function fails.
        ArgumentError: If the loss is not a tensor of one real number.
    """
    reached: dict[str, tuple[int, ...]] = {}

    def note(name: str, layer: CoordLayer, inputs: tuple[Any, ...]) -> None:
        size = tuple(inputs[0].shape[-len(layer.coord_geometry.kernel_size) :])
        reached.setdefault(name, size)

    handles = [
        layer.register_forward_hook(lambda module, inputs, _, name=name: note(name, module, inputs))
        for name, layer in layers.items()
    ]
    try:
        # Batch norms keep their statistics; and the compiler would trace the hooks.
        with torch.no_grad(), state_restored(patched), uncompiled(patched):
            value = loss_of(loss, patched, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ArgumentError(
            f"{given('the return value of loss_fn', value)}: return the loss, a tensor of one "
            "number, as it was computed; the model is trained by it"
        )
    if not reached:
        raise PatchError(
            "loss_fn(model, batch) ran none of the convolutions that are ranked: it must call the "
            "model that it is given, which is a patched copy, and not one that it knows otherwise"
        )
    return reached


def parts_of(
    layers: dict[str, CoordLayer], reached: dict[str, tuple[int, ...]], by: By | None
) -> tuple[Part, ...]:
    """The sites that were reached, alone or by stage; ``None``: by stage if they are many."""
    names: Sequence[str] = list(reached)
    if by is None:
        by = "site" if len(names) <= _MOST else "stage"
    stages = stages_of(names, str, most=_MOST)
    groups = (
        {stage.name.removesuffix(".*"): stage.members for stage in stages}
        if by == "stage"
        else {name: (name,) for name in names}
    )
    return tuple(
        Part(
            name or "the model",
            sites,
            reached[sites[0]],
            sum(layers[site].coord_weight.numel() for site in sites),
        )
        for name, sites in groups.items()
    )
