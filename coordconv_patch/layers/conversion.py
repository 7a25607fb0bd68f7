"""Turn a convolution module into a coordinate convolution and back, in place."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.coord_layer import new_coord_weight
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import TORCH_CONVS, ConvGeometry, Padding
from coordconv_patch.layers.padding_probe import padding_of
from coordconv_patch.layers.patched_classes import patched_class
from coordconv_patch.running.class_change import set_class
from coordconv_patch.running.untouched import in_mode

__all__ = [
    "check_convertible",
    "convert_",
    "on_other_base",
    "revert_",
]


def check_convertible(module: _ConvNd) -> Padding:
    """Whether :func:`convert_` would succeed; returns how the module pads.

    Raises:
        PatchError: With the reason why it would not.
    """
    if isinstance(module, CoordConvNd):
        raise PatchError(f"it already is a CoordConv with coordinates {module.coords}")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise PatchError("it is lazy: run the model once, so that its shape is known")
    if not isinstance(module, TORCH_CONVS):
        raise PatchError(
            f"{type(module).__name__} is not a torch.nn convolution of 1 to 3 dimensions"
        )
    if "forward" in vars(module):
        raise PatchError(
            "its forward is replaced on the instance (accelerate hooks, perhaps), which would "
            "bypass the coordinates: patch the model before"
        )
    taken = _OWN_NAMES & {
        *_names_of(type(module)),
        *vars(module),
        *module._parameters,
        *module._buffers,
        *module._modules,
    }
    if taken:
        raise PatchError(
            f"{type(module).__name__} has an attribute {min(taken)!r} of its own, which means "
            "something else in a coordinate convolution: give it another name"
        )
    with in_mode(module, training=False):  # a spectral norm in training iterates at every look
        return _padding_if_plain(module)


def _names_of(kind: type) -> set[str]:
    """What a class and its bases define, and what they say that instances have."""
    names = (vars(base).keys() | vars(base).get("__annotations__", {}) for base in kind.__mro__)
    return set().union(*names)


_OWN_NAMES = frozenset(
    name for name in _names_of(CoordConvNd) - _names_of(_ConvNd) if not name.startswith("__")
)
"""What coordinate convolutions have and torch's do not."""


def _padding_if_plain(module: _ConvNd) -> Padding:
    if hasattr(module.weight, "device_mesh"):  # a DTensor
        raise PatchError(
            "its weight is sharded over processes (FSDP, tensor parallel): patch the model before "
            "sharding it"
        )
    if not module.weight.dtype.is_floating_point:
        raise PatchError(f"its weight has dtype {module.weight.dtype}; coordinates need floats")
    return padding_of(module)


def convert_(module: _ConvNd, coords: Coordinates, padding: Padding) -> None:
    """Turn a convolution module into its coordinate class, in place.

    The object keeps its identity, and with it its hooks, parameters, flags and
    aliases; only its class changes. Call :func:`check_convertible` before.
    """
    with in_mode(module, training=False):  # a spectral norm in training iterates at every look
        weight = module.weight
    geometry = ConvGeometry.of(module)
    # First: it may not fit into memory.
    coord_weight = new_coord_weight(geometry, coords, device=weight.device, dtype=weight.dtype)
    before = type(module)
    if parametrize.is_parametrized(module):
        # torch takes a parametrized module back to its first base class when the last
        # parametrization is removed, so the coordinate class goes beneath.
        plain = cast("type[_ConvNd]", before.__bases__[0])
        set_class(module, on_other_base(before, patched_class(plain)))
    else:
        set_class(module, patched_class(before))
    try:
        cast(CoordConvNd, module)._attach(coords, padding, coord_weight)
    except BaseException:
        set_class(module, before)
        raise


def on_other_base(parametrized: type, base: type) -> type:
    """The class that torch made for a parametrized module, on another base class."""
    namespace = {
        k: v for k, v in vars(parametrized).items() if k not in ("__dict__", "__weakref__")
    }
    return type(parametrized)(parametrized.__name__, (base,), namespace)


def revert_(module: CoordConvNd) -> None:
    """Turn a coordinate convolution back into the class it was made from, in place."""
    module._detach()
    before, plain = type(module), module._plain_class
    if parametrize.is_parametrized(module):
        plain = on_other_base(before, plain)
    set_class(module, plain)
