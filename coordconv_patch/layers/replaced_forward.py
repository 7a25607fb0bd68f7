"""A forward that somebody puts on one coordinate layer: does it still reach the layer's own?

Hooks of accelerate and diffusers wrap the forward that was there, and coordinates are kept.
A forward that convolves with the layer's weight by itself leaves them out without a word. The
first call tells which it is; after that the forward stands there as it was given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.capture import is_capturing, is_transforming
from coordconv_patch.layers.padding_probe import ConvSpy

__all__ = ["ReplacedForward"]


class ReplacedForward:
    """A forward until its first call has shown that coordinates are in it.

    Args:
        layer: The coordinate layer; it keeps a ``_map_cache`` and a ``coord_weight``.
        function: What was assigned to its ``forward``.
    """

    def __init__(self, layer: Any, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function, updated=())
        self.layer = layer
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward, and see which weights it convolves with.

        Raises:
            PatchError: If it convolves with the layer's weight, but not with its coordinates'.
        """
        if is_capturing() or is_transforming():
            return self.function(*args, **kwargs)
        layer = self.layer
        layer._map_cache.clear()  # a kept map would not show
        with ConvSpy(layer) as spy:
            output = self.function(*args, **kwargs)
        weights = [
            positional[1] if len(positional) > 1 else named["weight"]
            for positional, named, *_ in spy.calls
        ]
        if _uses(layer, "weight", weights) and not _uses(layer, "coord_weight", weights):
            raise PatchError(
                f"the forward that was put on this {type(layer).__name__} convolves with its "
                "weight, but leaves its coordinates out: let it call the forward that was there "
                "before (old = layer.forward), or unpatch the model first"
            )
        if vars(layer).get("forward") is self:
            vars(layer)["forward"] = self.function
        return output


def _uses(layer: _ConvNd, name: str, weights: list[Tensor]) -> bool:
    """Whether a parameter of a layer is among some weights; its shape tells if it is computed.

    Maps are made from a copy of the coordinate weight.
    """
    own = layer._parameters.get(name)
    if own is None:
        own = getattr(layer, name)
        return any(weight.shape == own.shape for weight in weights)
    return any(weight is own or _is_copy(weight, own) for weight in weights)


def _is_copy(weight: Tensor, own: Tensor) -> bool:
    if weight.is_meta or own.is_meta:  # moved away by hooks
        return False
    return weight.shape == own.shape and weight.dtype is own.dtype and torch.equal(weight, own)
