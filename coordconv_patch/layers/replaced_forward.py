"""A forward that somebody puts on one coordinate layer: does it still reach the layer's own?

Hooks of accelerate and diffusers wrap the forward that was there, and coordinates are kept.
A forward that computes with the layer's weight by itself, or with one that is made of it, leaves
them out without a word. The first call tells which it is; after that the forward stands there as
it was given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.capture import is_capturing, is_transforming

__all__ = ["ReplacedForward", "look_at_forward", "put_forward"]


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
        """Call the forward, and see which weights it computes with.

        Raises:
            PatchError: If it computes with the layer's weight, but not with its coordinates'.
        """
        if is_capturing() or is_transforming():
            return self.function(*args, **kwargs)
        layer = self.layer
        layer._map_cache.clear()  # a kept map would not show
        with _UseOfWeights(layer) as use:
            output = self.function(*args, **kwargs)
        if use.of_weight and not use.of_coordinates:
            raise PatchError(
                f"the forward that was put on this {type(layer).__name__} computes with its "
                "weight, or with one of its shape, but leaves its coordinates out: let it call the "
                "forward that was there before (old = layer.forward), or unpatch the model first"
            )
        if vars(layer).get("forward") is self:
            put_forward(layer, self.function)
        return output


def put_forward(layer: Any, forward: Callable[..., Any]) -> None:
    """Put a forward on a layer that is known to see its coordinates, and so is not looked at."""
    vars(layer)["forward"] = vars(layer)["_accepted_forward"] = forward


def look_at_forward(layer: Any) -> None:
    """Let the next call of a forward that was written into a layer's ``__dict__`` be looked at.

    Assignments are seen by the layer itself; this forward came by another way.
    """
    own = vars(layer)
    forward = own["forward"]
    if type(forward) is ReplacedForward or forward is own.get("_accepted_forward"):
        return
    if callable(forward) and "_map_cache" in own and not is_capturing():
        own["forward"] = ReplacedForward(layer, forward)


class _UseOfWeights(TorchFunctionMode):
    """While entered, sees whether a layer's weight and its coordinate weight are computed with.

    A weight that is made of the layer's, by an adapter say, is known by its shape. Asking a tensor
    for its dtype or device is no computation.

    Attributes:
        of_weight: Whether the weight was used, or a convolution by one of its shape.
        of_coordinates: Whether the coordinate weight was.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        weight, coords = (layer._parameters.get(name) for name in ("weight", "coord_weight"))
        # A parametrized one is another tensor in each call. To ask it might change it (a spectral
        # norm in training), so its geometry is asked.
        geometry = layer.coord_geometry
        channels = layer.coords.num_channels(geometry.ndim)
        self.shape = geometry.weight_shape if weight is None else tuple(weight.shape)
        self.coords_shape = geometry.coord_weight_shape(channels) if coords is None else None
        self.of_weight = self.of_coordinates = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        if isinstance(output, Tensor):
            self.of_weight |= any(self._is_part_of("weight", one) for one in tensors)
            self.of_coordinates |= any(self._is_part_of("coord_weight", one) for one in tensors)
        if "conv" in str(getattr(func, "__name__", func)):
            # An input, which comes first, may have the shape of a weight.
            given = (*args[1:], *(value for key, value in kwargs.items() if key != "input"))
            shapes = {tuple(one.shape) for one in given if isinstance(one, Tensor)}
            self.of_weight |= self.shape in shapes
            self.of_coordinates |= self.coords_shape in shapes
        return output

    def _is_part_of(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter of a layer, or one that it is computed from."""
        layer = self.layer
        own = layer._parameters.get(name)
        if own is not None:  # looked up anew: hooks that offload weights bring others
            return tensor is own
        if tensor is vars(layer).get(name):  # pruned, or normed by an old weight_norm
            return True
        made_by = getattr(layer, "parametrizations", None)
        if made_by is None or name not in made_by:
            return False
        return any(tensor is each for each in made_by[name].parameters())
