"""Which convolutions of a model see coordinates beside an image, and by which convention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.concatenated.convention import convention_of
from coordconv_patch.concatenated.joins import owner_obstacle
from coordconv_patch.concatenated.recorded_run import Run
from coordconv_patch.concatenated.sightings import (
    Place,
    Sighting,
    convolved_by_functions,
    sightings,
)
from coordconv_patch.errors import PatchError, listing
from coordconv_patch.layers.conversion import check_convertible
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import Padding

__all__ = ["Recognised", "Recognition", "RunPair", "recognise"]

RunPair = tuple[Run, Run]
"""Two runs on different images of one size."""


@dataclass(frozen=True)
class Recognised:
    """A convolution whose input is an image and coordinates.

    Attributes:
        conv: Qualified name of the convolution module.
        places: What joins the two.
        image_channels: C.
        is_first: Whether the coordinates come before the image.
        coords: Their convention.
        deviation: Largest deviation from it, relative to the largest coordinate or 1.
        sizes: Sizes of the input that were seen.
        padding: How the convolution pads.
        still_joined: Why image and coordinates go on being joined, so that the convolution must
            read the image's part; empty if they do not.
    """

    conv: str
    places: tuple[Place, ...]
    image_channels: int
    is_first: bool
    coords: Coordinates
    deviation: float
    sizes: tuple[tuple[int, ...], ...]
    padding: Padding
    still_joined: str = ""


@dataclass
class Recognition:
    """What was read off a model.

    Attributes:
        convolutions: What was recognised, by the names of convolutions.
        refused: What looks like coordinates and cannot be imported, with the reason.
    """

    convolutions: dict[str, Recognised] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def recognise(model: nn.Module, pairs: Sequence[RunPair]) -> Recognition:
    """Read off recorded runs which convolutions see coordinates; nothing is changed.

    Args:
        model: The model.
        pairs: Its runs, a pair for each size.

    Raises:
        PatchError: If the model did different things on images of one size.
    """
    result = Recognition()
    seen: dict[str, list[Sighting]] = {}
    for first, second in pairs:
        for sighting in sightings(model, first, second):
            seen.setdefault(sighting.conv, []).append(sighting)
        for function, name in convolved_by_functions(model, first, second):
            result.refused[f"{function} in {name or 'the model'}"] = (
                "it is a convolution function: make it a torch.nn convolution module"
            )
    for name, each in seen.items():
        calls = sum(call.name == name for first, _ in pairs for call in first.convolutions)
        try:
            if any(name in first.with_more for first, _ in pairs):
                raise PatchError("it is called with more than its input, such as output_size")
            result.convolutions[name] = _recognised(model, each, calls)
        except PatchError as error:
            result.refused[name] = str(error)
    while _keep_joined(model, pairs, seen, result):
        pass
    return result


def _recognised(model: nn.Module, seen: Sequence[Sighting], calls: int) -> Recognised:
    """A convolution by what was seen of it; raises PatchError where it cannot be imported."""
    first, name = seen[0], seen[0].conv
    conv = model.get_submodule(name)
    assert isinstance(conv, _ConvNd)
    if len(seen) < calls:
        raise PatchError(f"{calls - len(seen)} of its {calls} calls see no coordinates")
    if any(each.grid is None for each in seen):
        raise PatchError("the channels beside the image depend on the image (a mask, perhaps)")
    if len({(each.image_channels, each.is_first) for each in seen}) > 1:
        raise PatchError("its calls see different channels")
    places = tuple(dict.fromkeys(each.place for each in seen))
    if any(place.kind == "layer" for place in places) and len(places) > 1:
        raise PatchError(
            f"it is called by {listing(place.name or 'the model' for place in places)}"
        )
    padding = _checked(model, name, conv)
    grids = _by_size(seen)
    coords, deviation = convention_of(list(grids.values()))
    return Recognised(
        name, places, first.image_channels, first.is_first, coords, deviation, tuple(grids), padding
    )


def _checked(model: nn.Module, name: str, conv: _ConvNd) -> Padding:
    """How a convolution pads; raises PatchError where its weight cannot be taken apart."""
    padding = check_convertible(conv)
    if conv.groups != 1:
        raise PatchError(
            f"it has groups={conv.groups}: its groups see different channels, and only some of "
            "them the coordinates"
        )
    if torch.finfo(conv.weight.dtype).eps > torch.finfo(torch.float32).eps:
        raise PatchError(
            f"in {conv.weight.dtype} coordinates are rounded too much to be read: import "
            "model.float(), and convert the result"
        )
    if "weight" not in conv._parameters:
        raise PatchError(
            "its weight is parametrized or pruned: torch.nn.utils.parametrize."
            "remove_parametrizations(conv, 'weight') or torch.nn.utils.prune.remove(conv, "
            "'weight') first"
        )
    others = [
        other
        for other, module in model.named_modules()
        if module is not conv and any(p is conv.weight for p in module._parameters.values())
    ]
    if others:
        raise PatchError(f"it shares its weight with {listing(others)}")
    return padding


def _by_size(seen: Iterable[Sighting]) -> dict[tuple[int, ...], Tensor]:
    """The coordinates at each size of more than one pixel along every axis."""
    grids: dict[tuple[int, ...], Tensor] = {}
    for each in seen:
        assert each.grid is not None
        kept = grids.setdefault(tuple(each.grid.shape[1:]), each.grid)
        if kept.shape != each.grid.shape or not bool((kept == each.grid).all()):
            raise PatchError("its coordinates differ between calls of one size")
    longer = {size: grid for size, grid in grids.items() if min(size) > 1}
    if not longer:
        raise PatchError("it was seen on one pixel only: give larger example inputs")
    return longer


def _keep_joined(
    model: nn.Module,
    pairs: Sequence[RunPair],
    seen: dict[str, list[Sighting]],
    result: Recognition,
) -> bool:
    """Note a convolution whose places cannot leave the coordinates out; whether there was one."""
    for name, recognised in result.convolutions.items():
        for place in () if recognised.still_joined else recognised.places:
            reason = _obstacle(model, place, pairs, seen, result)
            if reason:
                result.convolutions[name] = replace(recognised, still_joined=reason)
                return True
    return False


def _obstacle(
    model: nn.Module,
    place: Place,
    pairs: Sequence[RunPair],
    seen: dict[str, list[Sighting]],
    result: Recognition,
) -> str:
    """Why a place cannot leave its coordinates out; empty if it can."""
    module = model.get_submodule(place.name)
    if place.kind != "cat" and (module._forward_hooks or module._forward_pre_hooks):
        return f"{place.name}, which joins image and coordinates, has hooks, which would be lost"
    if place.kind == "layer":
        return ""
    if place.steps > 1:
        return f"{place.name or 'the model'} joins image and coordinates in {place.steps} steps"
    if place.kind == "cat" and owner_obstacle(module):
        return owner_obstacle(module)
    own = {name for name, each in result.convolutions.items() if not each.still_joined}
    importable = {each.output for name in own for each in seen[name] if each.place == place}
    for first, _ in pairs:
        for output in _outputs(place, first):
            others = {
                f"{function} in {name or 'the model'}"
                for function, name in first.uses[output]
                if name not in own
            }
            if others:
                return f"image and coordinates together are read by {listing(sorted(others))} too"
            if output not in importable:
                return (
                    f"{place.name or 'the model'} joins image and coordinates for something else "
                    "too, or another concatenation there looks the same"
                )
    return ""


def _outputs(place: Place, run: Run) -> list[int]:
    """The joined tensors of a place, and of what cannot be told from it, in one run."""
    if place.kind == "module":
        return [id(call.output) for call in run.modules.values() if call.name == place.name]
    return [
        id(cat.output)
        for cat in run.cats
        if place.name in cat.owners
        and tuple(int(part.shape[1]) for part in cat.parts) == place.channels
    ]
