"""Recognised convolutions get coordinates of this package, and lose the concatenated ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.concatenated.graph_joins import leave_out_of_graph_
from coordconv_patch.concatenated.joins import Join, leave_out_
from coordconv_patch.concatenated.recognition import Recognised, RunPair
from coordconv_patch.concatenated.sightings import Place
from coordconv_patch.folding.other_libraries import guard_folding_
from coordconv_patch.layers.concatenated_weight import taken_apart
from coordconv_patch.layers.conversion import convert_
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.left_behind.watch import watch_
from coordconv_patch.running.rollback import unchanged_on_failure

__all__ = ["joins_of", "rewrite_"]


def rewrite_(
    model: nn.Module, recognised: Iterable[Recognised], joins: dict[str, list[Join]]
) -> dict[str, str]:
    """Import recognised convolutions, in place.

    Args:
        model: The model that they were recognised in, or a copy of it.
        recognised: The convolutions.
        joins: The concatenations to leave out by the names of their owners, see
            :func:`joins_of`.

    Returns:
        The new name of each convolution, by its name.
    """
    chosen = list(recognised)
    names = {each.conv: each.conv for each in chosen}
    rewritten = [each for each in chosen if not each.still_joined]
    layers = {each.conv: p for each in rewritten for p in each.places if p.kind == "layer"}
    modules = {p for each in rewritten for p in each.places if p.kind == "module"}
    with unchanged_on_failure(model):
        for each in chosen:
            _give_coordinates_(model.get_submodule(each.conv), each)
        for name, place in layers.items():
            _replace_(model, place, model.get_submodule(name))
            names[name] = place.name
        for place in modules:
            _replace_(model, place, nn.Identity())
        for owner, own_joins in joins.items():
            module = model.get_submodule(owner)
            if isinstance(module, fx.GraphModule):
                leave_out_of_graph_(module, own_joins)
            else:
                leave_out_(module, own_joins)
        guard_folding_(model)
        watch_(model)
    return names


class _ReadsImage:
    """A hook that gives a convolution the image's channels of what it is called with."""

    def __init__(self, start: int, channels: int) -> None:
        self.start = start
        self.channels = channels

    def __call__(self, conv: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].narrow(1, self.start, self.channels), *args[1:])


@torch.no_grad()
def _give_coordinates_(conv: nn.Module, recognised: Recognised) -> None:
    """Take a convolution's weight apart: the image's channels, and the coordinates'."""
    assert isinstance(conv, _ConvNd)
    weight, channels = conv.weight, recognised.image_channels
    image, coordinates = taken_apart(
        weight, channels, transposed=conv.transposed, is_first=recognised.is_first
    )
    start = conv.in_channels - channels if recognised.is_first else 0
    conv.in_channels = channels
    conv.weight = nn.Parameter(image.clone(), weight.requires_grad)
    convert_(conv, recognised.coords, recognised.padding)
    assert isinstance(conv, CoordConvNd)
    conv.coord_weight.copy_(coordinates)
    conv.coord_weight.requires_grad_(weight.requires_grad)
    if recognised.still_joined:
        conv.register_forward_pre_hook(_ReadsImage(start, channels), prepend=True)


def _replace_(model: nn.Module, place: Place, new: nn.Module) -> None:
    """Put a module in the place of another one, under all of its names."""
    old = model.get_submodule(place.name)
    new.training = old.training
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def joins_of(
    model: nn.Module, recognised: Iterable[Recognised], pairs: Sequence[RunPair]
) -> dict[str, list[Join]]:
    """The concatenations that recognised convolutions need no longer, by their owners."""
    left_out = [each for each in recognised if not each.still_joined]
    places = {place for each in left_out for place in each.places if place.kind == "cat"}
    joins: dict[str, list[Join]] = {}
    for place in sorted(places, key=lambda place: (place.name, place.channels)):
        in_graph = isinstance(model.get_submodule(place.name), fx.GraphModule)
        join = Join(place.channels, place.kept, _positions(place, pairs, own=in_graph))
        joins.setdefault(place.name, []).append(join)
    return joins


def _positions(place: Place, pairs: Sequence[RunPair], *, own: bool) -> frozenset[int]:
    """Which concatenations of a forward these are; none where that changes from run to run.

    Args:
        place: What joins.
        pairs: The runs.
        own: Whether those in the code of modules that the forward calls do not count.
    """
    patterns: dict[tuple[int, int], list[bool]] = {}
    for index, (first, _) in enumerate(pairs):
        for cat in first.cats:
            if place.name in (cat.owners[-1:] if own else cat.owners):
                number = cat.around[cat.owners.index(place.name)]
                channels = tuple(int(part.shape[1]) for part in cat.parts)
                patterns.setdefault((index, number), []).append(channels == place.channels)
    different = {tuple(pattern) for pattern in patterns.values()}
    (pattern,) = different if len(different) == 1 else ((),)
    return frozenset(index for index, is_own in enumerate(pattern) if is_own)
