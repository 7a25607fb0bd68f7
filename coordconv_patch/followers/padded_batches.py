"""Models that pad pictures to the largest of their batch: each is placed where it lies.

Known are torchvision's detectors, whose ``GeneralizedRCNNTransform`` pads, and models whose
forward takes a ``pixel_mask``, as those of Hugging Face's transformers do.
"""

from __future__ import annotations

import inspect
import sys
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from coordconv_patch.errors import PatchError, excerpt
from coordconv_patch.followers.follower import Begin, Follower, FollowerHook, hook_
from coordconv_patch.followers.valid_area import places_by_masks, places_by_sizes

__all__ = ["is_padding", "is_padding_transform", "put_padding_hooks_", "takes_mask"]

_MASK = "pixel_mask"


def is_padding(module: nn.Module) -> bool:
    """Whether a module pads pictures in one of the ways that are known."""
    return _transform_of(module) is not None or takes_mask(module)


def put_padding_hooks_(module: nn.Module, follower: Follower) -> None:
    """Let a follower place pictures where a module pads them."""
    transform = _transform_of(module)
    if transform is None:
        hook_(module, BeginByMask(follower))
    else:
        hook_(module, Begin(follower))
        transform.register_forward_hook(AfterTransform(follower))


def is_padding_transform(module: nn.Module) -> bool:
    """Whether a module is the part of torchvision's detectors that pads."""
    # Only a program that has imported torchvision can have one.
    transforms = sys.modules.get("torchvision.models.detection.transform")
    return transforms is not None and isinstance(module, transforms.GeneralizedRCNNTransform)


def takes_mask(module: nn.Module) -> bool:
    """Whether a module's forward is told by a mask which pixels are not padding."""
    return _names_with_mask(module) is not None


def _transform_of(module: nn.Module) -> nn.Module | None:
    """The child of a torchvision detector that pads."""
    return next(filter(is_padding_transform, module.children()), None)


def _names_with_mask(module: nn.Module) -> list[str] | None:
    """The arguments of a module's forward, if the mask is one; a subclass may pass them on."""
    for kind in type(module).__mro__:
        forward = vars(kind).get("forward")
        if isinstance(forward, FunctionType):
            names = list(inspect.signature(forward).parameters)[1:]
            if _MASK in names:
                return names
    return None


class AfterTransform(FollowerHook):
    """After torchvision's transform, which gives padded pictures and the sizes they had."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.follower.is_running:
            images = output[0]
            canvas = tuple(images.tensors.shape[-2:])
            theta = places_by_sizes(canvas, images.image_sizes, images.tensors.device)
            self.follower.place(theta, has_outside=True)


class BeginByMask(Begin):
    """Before a forward that is given a mask of the pixels that are not padding."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__call__(module, args, kwargs)
        mask = _given_mask(module, args, kwargs)
        if mask is not None:
            self.follower.place(places_by_masks(mask), has_outside=True)


def _given_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    names = _names_with_mask(module) or []
    # Not dict(zip(...)): where the graph breaks here, dynamo of torch 2.9 cannot rebuild a zip.
    named = {name: args[index] for index, name in enumerate(names[: len(args)])}
    mask = (named | kwargs).get(_MASK)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 3):
        return mask
    what = tuple(mask.shape) if isinstance(mask, Tensor) else excerpt(mask)
    raise PatchError(
        f"pixel_mask={what}: follow_padding_ knows masks of shape (N, H, W); give places by "
        "`with places(model, theta)`, after follow_padding_(model, False)"
    )
