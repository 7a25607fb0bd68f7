"""Models that are trained on squares and then run on the middle of them, as ultralytics' are.

A picture is resized until its longer side is that of the square, and centred; predicting and
validating leave out most of the grey above and below, or left and right. An input of h x w pixels
is then the middle of a square of S x S, and its place is ``diag(w / S, h / S)``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.followers.follower import Begin, Follower
from coordconv_patch.followers.valid_area import numbers, place_of

__all__ = ["BeginInSquare", "called_part"]


class BeginInSquare(Begin):
    """Before the forward of a model: its input is the middle of a square.

    Args:
        follower: The follower.
        side: Of the square, in pixels, in evaluation mode; ``None``: the input's longer side.
    """

    def __init__(self, follower: Follower, side: int | None) -> None:
        super().__init__(follower)
        self.side = side

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__call__(module, args, kwargs)
        images = _images_of((*args, *kwargs.values()))
        height, width = images.shape[-2:]
        extent = numbers((width, height), images.device)
        side = self.side if self.side is not None and not module.training else extent.amax()
        scale = (extent / side).unsqueeze(0)
        self.follower.place(place_of(scale, torch.zeros_like(scale)))


def called_part(model: nn.Module) -> nn.Module:
    """The module whose forward gets the pictures: of ultralytics' YOLO object, its network."""
    # Only a program that has imported ultralytics can have one.
    tasks = sys.modules.get("ultralytics.nn.tasks")
    if tasks is None:
        return model
    parts = (part for part in model.modules() if isinstance(part, tasks.BaseModel))
    return next(parts, model)


def _images_of(inputs: tuple[Any, ...]) -> Tensor:
    """The pictures, shape (N, C, H, W): the first such input, or in a training's batch ``img``."""
    for given in inputs:
        images = given.get("img") if isinstance(given, Mapping) else given
        if isinstance(images, Tensor) and images.dim() == 4:
            return images
    raise PatchError(
        "follow_letterbox_ reads the size of the pictures off the model's first input of shape (N, "
        "C, H, W), or off img in a dict, and this call has none: undo it by "
        "follow_letterbox_(model, False), and use places(...)"
    )
