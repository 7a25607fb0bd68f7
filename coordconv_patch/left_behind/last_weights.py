"""The weights of a model's convolutions and coordinate layers, where they can be read.

By ``_parameters`` and never by attribute: while somebody traces a model symbolically, an
attribute is a Proxy, and reading it adds a node to the graph.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.layers.branch import BRANCH_NAME, CoordBranch, site_of_branch
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.weight_marks import WeightMark, is_plain
from coordconv_patch.left_behind.heirs import Kernel

__all__ = [
    "Place",
    "is_coord_layer",
    "is_trained",
    "kernel_of",
    "layout_of",
    "mark_of",
    "place_of",
    "site_of",
    "weight_of",
]


Place: TypeAlias = "tuple[dict[str, nn.Parameter | None], str]"
"""A module's parameters, and the name that a weight has among them."""


def weight_of(module: nn.Module, name: str, layer: nn.Module) -> Tensor | None:
    """The weight of a convolution, or of the convolution that a coordinate branch is added to.

    ``None`` if it has none of its own: computed, sharded or fake ones.
    """
    place = place_of(module, name, layer)
    weight = None if place is None else place[0].get(place[1])
    if weight is None or not is_plain(weight):
        return None
    return weight if isinstance(layer, _ConvNd) or _has_geometry(weight, layer) else None


def place_of(module: nn.Module, name: str, layer: nn.Module) -> Place | None:
    """Where the :func:`weight_of` a layer stands, if there is one."""
    if isinstance(layer, _ConvNd):
        return layer._parameters, "weight"
    if not isinstance(layer, CoordBranch):
        return None
    holder, _, own = site_of(name).rpartition(".")
    try:
        inner = module.get_submodule(holder)
    except AttributeError:
        return None
    if own not in inner._modules:
        return inner._parameters, own
    conv = inner._modules[own]
    return None if conv is None else (conv._parameters, "weight")


def _has_geometry(weight: Tensor, layer: nn.Module) -> bool:
    """Whether a weight is that of the convolution which a coordinate branch was made for."""
    assert isinstance(layer, CoordBranch)
    return tuple(weight.shape) == layer.coord_geometry.weight_shape


def site_of(name: str) -> str:
    """The site of a coordinate layer, by the layer's qualified name."""
    return site_of_branch(name) if name.endswith(BRANCH_NAME) else name


def layout_of(layer: nn.Module) -> tuple[bool, int]:
    """Whether a convolution is transposed, and its groups."""
    conv: Any = layer.coord_geometry if isinstance(layer, CoordBranch) else layer
    return conv.transposed, conv.groups


def kernel_of(layer: nn.Module, weight: Tensor, coord_weight: Tensor | None) -> Kernel:
    """A layer's weights by output channel."""
    transposed, groups = layout_of(layer)
    return Kernel.of(weight, coord_weight, transposed=transposed, groups=groups)


def mark_of(layer: CoordLayer, weight: Tensor) -> WeightMark | None:
    """A mark of a layer's weights as they are now; ``None`` if its own is computed."""
    coords = layer._parameters.get("coord_weight")
    if coords is None or not is_plain(coords):
        return None
    transposed, groups = layout_of(layer)
    has_bias = layer._parameters.get("bias") is not None
    return WeightMark.of(weight, coords, transposed=transposed, groups=groups, has_bias=has_bias)


def is_coord_layer(layer: nn.Module) -> bool:
    """Whether a layer has coordinates, which nobody has taken off."""
    is_layer = isinstance(layer, CoordLayer)
    return is_layer and not layer.__dict__.get("is_dismissed")


def is_trained(coord_weight: Tensor | None) -> bool:
    """Whether coordinates would be missed."""
    return is_plain(coord_weight) and coord_weight is not None and bool(coord_weight.any())
