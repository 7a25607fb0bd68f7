"""Other images, and images of other sizes, made from example inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["GROWTHS", "other_images", "resized"]

GROWTHS = ((64, 32, 32), (32, 64, 64), (0, 8, 8))
"""Pixels that are added to the last, the second last and the third last dimension.

Unequal, since some code divides each axis by the other's length; multiples of 32 suit networks
that halve their input five times.
"""


def other_images(example_inputs: Any) -> Any:
    """Inputs of the same shapes with other values."""
    return _mapped(example_inputs, (0, 0, 0), False)


def resized(example_inputs: Any, growth: tuple[int, ...]) -> Any:
    """Inputs whose images are larger, with other values.

    Args:
        example_inputs: Tensors of three dimensions or more are images: ``(N, C, *size)``, in a
            list ``(C, *size)``.
        growth: One of :data:`GROWTHS`.
    """
    return _mapped(example_inputs, growth, False)


def _mapped(value: Any, growth: tuple[int, ...], in_list: bool) -> Any:
    if isinstance(value, Tensor):
        return _redrawn(value, growth, 1 if in_list else 2) if value.dim() > 2 else value
    if type(value) is tuple:  # arguments, or a part of one
        return tuple(_mapped(each, growth, in_list) for each in value)
    if type(value) is list:
        return [_mapped(each, growth, True) for each in value]
    if type(value) is dict:
        return {key: _mapped(each, growth, in_list) for key, each in value.items()}
    return value


def _redrawn(image: Tensor, growth: tuple[int, ...], first: int) -> Tensor:
    """Values drawn from the image's own, so that they are such as the model takes."""
    shape = list(image.shape)
    for added, dim in zip(growth, range(image.dim() - 1, first - 1, -1), strict=False):
        shape[dim] += added
    values = image.detach().flatten()
    if image.is_floating_point() and bool((values == values[0]).all()):
        return torch.randn(shape, dtype=image.dtype, device=image.device)
    drawn = torch.randint(len(values), shape, device=image.device)
    return values[drawn]
