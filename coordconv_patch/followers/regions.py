"""Models that pool regions of interest: layers behind see where in the picture each region lies.

torchvision's roi_align reads a feature map, scaled by s from pixels of the network's input, at
positions where k means the *centre* of the map's pixel k. With ``aligned=False``, as in
``MultiScaleRoIAlign``, it takes a box's corner x1 to be at ``s x1``, so what it reads there is
what lies half of the map's pixel further: at ``x1 + 1 / (2 s)`` of the input. (``aligned=True``
takes the half pixel off.) It also makes a box at least one of the map's pixels wide. So a region
begins and ends, in pixels of the input, at::

    left = x1 + (0 if aligned else 1 / (2 s))
    right = left + (x2 - x1 if aligned else max(x2 - x1, 1 / s))

and its place in a picture of w pixels is ``(right - left) / w`` wide, shifted by
``(left + right) / w - 1``; y likewise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.followers.follower import Begin, Follower, FollowerHook, hook_
from coordconv_patch.followers.valid_area import numbers, place_of, wide_dtype
from coordconv_patch.layers.coord_layer import coord_layers

__all__ = ["pools_by_owner", "put_region_hooks_", "put_whole_region_hooks_", "region_places"]


def pools_by_owner(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of a model that pool regions, by the name of the module that is placed.

    That is the innermost one around a pool that has coordinate layers: from the pool on until it
    ends, layers see regions.
    """
    # Only a program that has imported torchvision can have them.
    ops = sys.modules.get("torchvision.ops")
    if ops is None:
        return {}
    owners: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (ops.MultiScaleRoIAlign, ops.RoIAlign)):
            continue
        owner = name
        while owner:
            owner = owner.rpartition(".")[0]
            if coord_layers(model.get_submodule(owner)):
                break
        owners.setdefault(owner, []).append(module)
    return owners


def put_region_hooks_(owner: nn.Module, pools: Sequence[nn.Module], follower: Follower) -> None:
    """Let a follower place the regions that pools inside of a module cut out."""
    hook_(owner, Begin(follower))
    for pool in pools:
        kind = AfterMultiScalePool if hasattr(pool, "featmap_names") else AfterPool
        pool.register_forward_hook(kind(follower), with_kwargs=True)


def put_whole_region_hooks_(
    owner: nn.Module, pools: Sequence[nn.Module], follower: Follower
) -> None:
    """Let layers behind pools see whole regions, whatever holds for the pictures."""
    hook_(owner, Begin(follower))
    for pool in pools:
        pool.register_forward_hook(RegionsAreWhole(follower))


def region_places(boxes: Tensor, pixel: Tensor, sizes: Tensor, *, aligned: bool = False) -> Tensor:
    """The places of regions in their pictures.

    Args:
        boxes: Shape (M, 4): x1, y1, x2, y2 in pixels of the network's input.
        pixel: How many of those a pixel of the map is that each was pooled from, 1 / s; shape (M,)
            or (1,).
        sizes: Height and width of the picture that each is in, shape (M, 2) or (1, 2).
        aligned: As :func:`torchvision.ops.roi_align` was told.

    Returns:
        Shape (M, 2, 3).
    """
    extent = sizes.flip(1)
    pixel = pixel.unsqueeze(-1)
    start, length = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    if not aligned:
        start, length = start + pixel / 2, torch.maximum(length, pixel)
    return place_of(length / extent, (2 * start + length) / extent - 1)


class AfterMultiScalePool(FollowerHook):
    """After a ``MultiScaleRoIAlign``, whose inputs are maps, boxes and the pictures' sizes."""

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not self.follower.is_running:
            return
        given = dict(zip(("x", "boxes", "image_shapes"), args, strict=False)) | kwargs
        boxes, samples = _joined(given["boxes"])
        pixels = 1 / numbers(module.scales, boxes.device)
        if len(module.scales) > 1:
            pixels = pixels[module.map_levels(given["boxes"])]
        sizes = torch.stack([numbers(size, boxes.device) for size in given["image_shapes"]])
        self.follower.place(region_places(boxes, pixels, sizes[samples]), samples=samples)


class AfterPool(FollowerHook):
    """After a ``RoIAlign``, whose inputs are one map and boxes: the picture is the whole map."""

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not self.follower.is_running:
            return
        given = dict(zip(("input", "rois"), args, strict=False)) | kwargs
        if isinstance(given["rois"], Tensor):
            rois = given["rois"].detach().to(wide_dtype(given["rois"].device))
            boxes, samples = rois[:, 1:], rois[:, 0].long()
        else:
            boxes, samples = _joined(given["rois"])
        pixel = 1 / numbers([module.spatial_scale], boxes.device)
        sizes = numbers(given["input"].shape[-2:], boxes.device) * pixel
        theta = region_places(boxes, pixel, sizes.unsqueeze(0), aligned=module.aligned)
        self.follower.place(theta, samples=samples, in_input=True)


class RegionsAreWhole(FollowerHook):
    """After a pool of a model that follows its padding and not its regions.

    What is behind gets as many samples as there are regions, and not one for each picture.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.follower.is_running:
            self.follower.place_as_whole()


def _joined(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The boxes of all pictures, shape (M, 4), and which picture each is in, shape (M,)."""
    if not boxes:
        raise PatchError("follow_regions_: the model pools regions of no picture")
    # A trace follows this, and would take a number of boxes for a constant.
    samples = [torch.full_like(each[:, 0], index) for index, each in enumerate(boxes)]
    joined = torch.cat([each.detach() for each in boxes])
    return joined.to(wide_dtype(joined.device)), torch.cat(samples).long()
