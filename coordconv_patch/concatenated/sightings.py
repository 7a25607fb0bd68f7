"""Where coordinates enter convolutions: read off two runs of a model on different images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.concatenated.recorded_run import CatCall, ModuleCall, Run
from coordconv_patch.errors import PatchError
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.geometry import CONV_FUNCTIONS

__all__ = [
    "Place",
    "Sighting",
    "convolution_in",
    "convolved_by_functions",
    "may_be_rewritten",
    "sightings",
]


@dataclass(frozen=True)
class Place:
    """What puts coordinates beside an image.

    Attributes:
        kind: ``"layer"``: a module that does that and convolves the result, nothing else.
            ``"module"``: a module that does that alone. ``"cat"``: ``torch.cat`` in a
            module's own code.
        name: Qualified name of the module.
        channels: For ``"cat"`` the channels of each part; empty otherwise.
        kept: For ``"cat"`` which parts are the image: ``(first, end)``.
        steps: For ``"cat"`` how many concatenations it takes: of the last one are the others.
    """

    kind: Literal["layer", "module", "cat"]
    name: str
    channels: tuple[int, ...] = ()
    kept: tuple[int, int] = (0, 1)
    steps: int = 1


@dataclass(frozen=True)
class Sighting:
    """One call of a convolution whose input is an image and coordinates.

    Attributes:
        conv: Qualified name of the convolution module.
        place: What joins the two.
        output: Identity of the joined tensor; 0 for a layer.
        image_channels: C.
        is_first: Whether the coordinates come before the image.
        grid: The coordinates, shape ``(K, *size)``, float64 on the CPU; ``None`` where they
            depend on the image.
    """

    conv: str
    place: Place
    output: int
    image_channels: int
    is_first: bool
    grid: Tensor | None


def convolution_in(module: nn.Module) -> _ConvNd | None:
    """The one convolution inside a module; ``None`` if there are none or several."""
    convs = [m for m in module.modules() if isinstance(m, _ConvNd) and m is not module]
    return convs[0] if len(convs) == 1 else None


def may_be_rewritten(module: nn.Module) -> bool:
    """Whether a module can be one that concatenates coordinates, and convolves them perhaps.

    It holds no parameters but those of one convolution, and no layers of torch.nn that compute. A
    class of some ports derives from a convolution and holds the one that it calls.
    """
    conv = convolution_in(module)
    inner = [m for m in module.modules() if m is not module and m is not conv]
    if isinstance(module, (CoordLayer, CoordBranch)) or any(map(_computes, inner)):
        return False
    if isinstance(module, _ConvNd):
        return conv is not None
    own = {id(p) for p in module.parameters()} - (
        {id(p) for p in conv.parameters()} if conv else set()
    )
    return not own and not _computes(module)


def _computes(module: nn.Module) -> bool:
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)):
        return False
    return isinstance(module, _ConvNd) or type(module).__module__.startswith("torch.nn.")


def sightings(model: nn.Module, first: Run, second: Run) -> list[Sighting]:
    """The calls of convolutions that see coordinates, in two runs on images of one size.

    Args:
        model: The model.
        first: One run.
        second: Another one, on other images.

    Returns:
        Each sighting in the first run.

    Raises:
        PatchError: If the two runs did different things.
    """
    if [call.name for call in first.convolutions] != [call.name for call in second.convolutions]:
        raise PatchError("which convolutions run depends on the values of the image")
    cats = {id(cat.output): index for index, cat in enumerate(first.cats)}
    outputs = {id(call.output): number for number, call in first.modules.items()}
    seen: list[Sighting] = []
    for one, other in zip(first.convolutions, second.convolutions, strict=True):
        sighting = _in_layer(model, one, other, first, second)
        number, index = outputs.get(id(one.input)), cats.get(id(one.input))
        if sighting is None and number is not None:
            sighting = _behind_module(one, other, first.modules[number], second.modules.get(number))
        if sighting is None and index is not None and len(first.cats) == len(second.cats):
            sighting = _behind_cat(one, index, cats, first, second)
        if sighting is not None:
            seen.append(sighting)
    return seen


def _in_layer(
    model: nn.Module, one: ModuleCall, other: ModuleCall, first: Run, second: Run
) -> Sighting | None:
    """A call inside of a module that concatenates and convolves, the innermost one."""
    for number, number_then in zip(reversed(one.around), reversed(other.around), strict=True):
        call, then = first.modules.get(number), second.modules.get(number_then)
        if call is None or then is None or call.output is not one.output:
            continue
        if call.version != one.version:  # it was written to by an operation in place
            continue
        if convolution_in(model.get_submodule(call.name)) is not model.get_submodule(one.name):
            continue
        place = Place("layer", call.name)
        return _compared(one, other, call.input, then.input, place, 0)
    return None


def _behind_module(
    one: ModuleCall, other: ModuleCall, call: ModuleCall, then: ModuleCall | None
) -> Sighting | None:
    if then is None or then.name != call.name or then.output is not other.input:
        return None
    return _compared(
        one, other, call.input, then.input, Place("module", call.name), id(call.output)
    )


def _compared(
    one: ModuleCall, other: ModuleCall, image: Tensor, image_then: Tensor, place: Place, output: int
) -> Sighting | None:
    """A call whose input holds an image, and beside it channels that are the same in both runs."""
    joined, joined_then, channels = one.input, other.input, image.shape[1] if image.dim() > 2 else 0
    count = joined.shape[1] - channels
    if not channels or count < 1 or joined.shape[2:] != image.shape[2:]:
        return None
    for is_first in (False, True):
        start = count if is_first else 0
        if not torch.equal(joined.narrow(1, start, channels), image.to(joined.dtype)):
            continue
        rest, rest_then = (
            each.narrow(1, 0 if is_first else channels, count) for each in (joined, joined_then)
        )
        grid = _grid(rest, rest_then)
        if grid is not None or count <= _MOST_CHANNELS:
            return Sighting(one.name, place, output, channels, is_first, grid)
    return None


_MOST_CHANNELS = 5
"""Channels that depend on the image are taken for coordinates up to this number (a masked x, y)."""


def _grid(channels: Tensor, channels_then: Tensor) -> Tensor | None:
    """Channels that are the same for each image, without the batch; ``None`` if they are not."""
    if channels.shape != channels_then.shape or not torch.equal(channels, channels_then):
        return None
    if not torch.equal(channels, channels[:1].expand_as(channels)):
        return None
    return channels[0].detach().to("cpu", torch.float64)


def _behind_cat(
    one: ModuleCall, index: int, cats: Mapping[int, int], first: Run, second: Run
) -> Sighting | None:
    """A call on the result of a concatenation some parts of which are the same in both runs."""
    cat = first.cats[index]
    joined = _image_and_coordinates(cat, second.cats[index])
    if joined is None or not cat.owners:
        return None
    kept, grid = joined
    is_first, steps = kept[0] > 0, 1
    image = cat.parts[kept[0] : kept[1]]
    # r is concatenated by itself in some code, to an image that has x and y already.
    while len(image) == 1 and (inner := cats.get(id(image[0]))) is not None:
        joined = _image_and_coordinates(first.cats[inner], second.cats[inner])
        if joined is None or (joined[0][0] > 0) != is_first:
            break
        (start, end), more = joined
        grid = torch.cat((grid, more) if is_first else (more, grid))
        image, steps = first.cats[inner].parts[start:end], steps + 1
    channels = tuple(int(part.shape[1]) for part in cat.parts)
    place = Place("cat", cat.owners[-1], channels, kept, steps)
    image_channels = sum(int(part.shape[1]) for part in image)
    return Sighting(one.name, place, id(cat.output), image_channels, is_first, grid)


def _image_and_coordinates(cat: CatCall, then: CatCall) -> tuple[tuple[int, int], Tensor] | None:
    """Which parts are an image, ``(first, end)``, and the others; ``None`` if it is not so."""
    if cat.owners != then.owners or len(cat.parts) != len(then.parts):
        return None
    grids = [_grid(part, part_then) for part, part_then in zip(cat.parts, then.parts, strict=True)]
    images = [index for index, grid in enumerate(grids) if grid is None]
    coordinates = [grid for grid in grids if grid is not None]
    if not images or not coordinates or images != list(range(images[0], images[-1] + 1)):
        return None
    if images[0] > 0 and images[-1] < len(grids) - 1:
        return None  # on both sides
    return (images[0], images[-1] + 1), torch.cat(coordinates)


def convolved_by_functions(model: nn.Module, first: Run, second: Run) -> set[tuple[str, str]]:
    """Convolution functions that see an image and coordinates in a module's own code.

    Returns:
        The name of each function, and that of the module that calls it.
    """
    uses: set[tuple[str, str]] = set()
    for cat, then in zip(first.cats, second.cats, strict=False):
        if _image_and_coordinates(cat, then) is not None:
            uses |= first.uses[id(cat.output)]
    return {
        (function, name)
        for function, name in uses
        if function in _FUNCTIONS and not isinstance(model.get_submodule(name), _ConvNd)
    }


_FUNCTIONS = frozenset(function.__name__ for function in CONV_FUNCTIONS.values())
