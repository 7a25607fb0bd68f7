"""Let a model's coordinate layers follow what the model does to its pictures by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from coordconv_patch.arguments import check_flag
from coordconv_patch.errors import ArgumentError, PatchError, excerpt
from coordconv_patch.followers.follower import Follower, followers_of, hook_, release_
from coordconv_patch.followers.letterboxes import BeginInSquare, called_part
from coordconv_patch.followers.padded_batches import is_padding, put_padding_hooks_
from coordconv_patch.followers.regions import (
    pools_by_owner,
    put_region_hooks_,
    put_whole_region_hooks_,
)
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.place_of import check_takes_places
from coordconv_patch.layers.places import shared_places
from coordconv_patch.running.wrappers import unwrapped

__all__ = ["follow_letterbox_", "follow_padding_", "follow_regions_", "renew_followers_"]

_BY_HAND = "give the places yourself: `with places(model, theta)`"


def follow_padding_(model: nn.Module, follow: bool = True) -> nn.Module:
    """Let pictures in a padded batch see coordinates of their own extent, in place.

    Detectors pad the pictures of a batch to the size of the largest. Coordinates then end where
    the batch ends, and a picture's result depends on what is beside it. A model that follows its
    padding places each picture, see :func:`coordconv_patch.places`: coordinates run from one edge
    of it to the other. In the padding they are zero, as convolutions pad. Places that are
    entered around a forward pass are those of the pictures without their padding.

    Known are torchvision's detectors, by their ``GeneralizedRCNNTransform``, and models whose
    forward takes a ``pixel_mask`` of shape (N, H, W), as Hugging Face's DETR and its relatives
    do; without a mask pictures count as whole. Outputs at coordinate weights of zero stay what
    they are, to the last bit. The model has to be called (``model(images)``, not
    ``model.forward(images)``). Copies and pickles of the model follow too; ``unpatch`` ends it.

    Args:
        model: A patched model, or one that holds or wraps such a model. To follow twice is the
            same as once.
        follow: ``False``: stop following.

    Returns:
        The model itself.

    Raises:
        ArgumentError: If ``follow`` is not a truth value.
        PatchError: If the model is not patched, pads in no known way, or follows a letterbox.
        CoordinatesError: If a layer's convention has a window already or ``swap_sizes``, or the
            layer is not of two dimensions.
    """
    _require(model, follow, "padding")
    owners = dict(_outermost(model, is_padding)) if follow else {}
    if follow and not owners:
        raise PatchError(
            f"{type(model).__name__} does not pad batches in a way that is known: known are "
            "torchvision's detectors (GeneralizedRCNNTransform) and models whose forward takes a "
            f"pixel_mask (Hugging Face's DETR, ...). If it pads, {_BY_HAND}"
        )
    if follow:
        _refuse_other(model, "letterbox", "follow_letterbox_")
    release_(model, "padding")
    for part in owners.values():
        put_padding_hooks_(part, _follower("padding", part))
    _settle_regions_(model)
    return model


def follow_letterbox_(
    model: nn.Module, follow: bool = True, *, side: int | None = None
) -> nn.Module:
    """Let inputs that are the middle of a square see the coordinates of that square, in place.

    ultralytics trains on squares in which pictures are centred, and predicts and validates on
    rectangles that leave most of the grey out. A model that follows places an input of h x w
    pixels in the middle of the square with the longer side. It suits all who pad to a square in
    training and to a rectangle afterwards, on both sides alike.

    Args:
        model: A patched model; it gets the pictures as a tensor (N, C, H, W), or in a dict as
            ``img``.
        follow: ``False``: stop following.
        side: Side of the square in pixels, for evaluation mode: ``imgsz`` for ultralytics'
            ``val``, whose rectangles have a margin of half a stride around the picture.
            ``None``: the longer side of the input, which is right for ``predict``. In training mode
            it is always that.

    Returns:
        The model itself.

    Raises:
        ArgumentError: If ``follow`` is not a truth value, or ``side`` not a positive integer.
        PatchError: If the model is not patched, or follows its padding; at a forward pass that
            gets no pictures.
        CoordinatesError: As :func:`follow_padding_`.
    """
    _require(model, follow, "letterbox")
    if side is not None and (type(side) is not int or side <= 0):
        raise ArgumentError(f"side={excerpt(side)}: write a number of pixels, such as side=640")
    if follow:
        _refuse_other(model, "padding", "follow_padding_")
    release_(model, "letterbox")
    if follow:
        part = called_part(unwrapped(model))
        hook_(part, BeginInSquare(_follower("letterbox", part), side))
    return model


def follow_regions_(model: nn.Module, follow: bool = True) -> nn.Module:
    """Let layers behind pooled regions see where in the picture each region lies, in place.

    Convolutions behind RoIAlign, as in Mask R-CNN's heads, get regions, and their coordinates run
    from one edge of the region to the other. In a model that follows, each region is placed in its
    picture, by the box and the feature map that it was pooled from, to a fraction of a pixel; in
    the picture without its padding, whether or not the model follows that. Known are torchvision's
    ``MultiScaleRoIAlign``, and ``RoIAlign``, which is not told the sizes of pictures: it takes them
    to fill the network's input, or to lie there as :func:`follow_padding_` says.

    Args:
        model: A patched model, or one that holds or wraps such a model.
        follow: ``False``: stop following.

    Returns:
        The model itself.

    Raises:
        ArgumentError: If ``follow`` is not a truth value.
        PatchError: If the model is not patched, or pools no regions in a known way.
        CoordinatesError: As :func:`follow_padding_`.
    """
    _require(model, follow, "regions")
    owners = pools_by_owner(model) if follow else {}
    if follow and not owners:
        raise PatchError(
            f"{type(model).__name__} does not pool regions in a way that is known: known are the "
            "modules MultiScaleRoIAlign and RoIAlign of torchvision.ops. If it does, "
            f"{_BY_HAND} around the layers behind"
        )
    release_(model, "regions")
    for name, pools in owners.items():
        owner = model.get_submodule(name)
        put_region_hooks_(owner, pools, _follower("regions", owner))
    _settle_regions_(model)
    return model


def renew_followers_(model: nn.Module) -> None:
    """Let the followers of a model place the coordinate layers that it got since, too."""
    followers = followers_of(model)
    for name, follower in followers:
        layers = coord_layers(model.get_submodule(name))
        _check(layers, follower.kind)
        follower.places[:] = shared_places(layers.values())
    if any(follower.kind == "regions" for _, follower in followers):
        follow_regions_(model)  # layers nearer to a pool may have come
    _settle_regions_(model)


def _settle_regions_(model: nn.Module) -> None:
    """Let regions be whole where pictures are placed, and regions are not."""
    release_(model, "whole regions")
    kinds = {follower.kind for _, follower in followers_of(model)}
    if "padding" in kinds and "regions" not in kinds:
        for name, pools in pools_by_owner(model).items():
            owner = model.get_submodule(name)
            put_whole_region_hooks_(owner, pools, _follower("whole regions", owner))


def _follower(kind: str, module: nn.Module) -> Follower:
    return Follower(kind, shared_places(coord_layers(module).values()))


def _require(model: nn.Module, follow: bool, kind: str) -> None:
    check_flag("follow", follow)
    layers = require_coord_layers(model)
    if follow:
        _check(layers, kind)


def _check(layers: Mapping[str, CoordLayer], kind: str) -> None:
    for name, layer in layers.items():
        if layer.coord_geometry.ndim != 2:
            raise PatchError(
                f"{name} has {layer.coord_geometry.ndim} dimensions, and {kind} is followed for "
                f"pictures of two: {_BY_HAND}"
            )
        check_takes_places(name, layer)


def _outermost(
    model: nn.Module, matches: Callable[[nn.Module], bool], name: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a kind that are not inside of another one, each once, with names."""
    if coord_layers(model) and matches(model):
        yield name, model
        return
    for child_name, child in model.named_children():
        yield from _outermost(child, matches, f"{name}.{child_name}".lstrip("."))


def _refuse_other(model: nn.Module, kind: str, function: str) -> None:
    if any(follower.kind == kind for _, follower in followers_of(model)):
        raise PatchError(
            f"the model follows its {kind} already, and an input cannot be both: undo that by "
            f"{function}(model, False)"
        )
