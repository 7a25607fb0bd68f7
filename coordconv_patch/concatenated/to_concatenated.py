"""The way back: coordinate convolutions as plain torch modules that concatenate."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from coordconv_patch.concatenated.coordinate_graph import coordinate_graph
from coordconv_patch.errors import PatchError
from coordconv_patch.folding.other_libraries import release_folding_
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.conversion import revert_
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import DECLARED, TORCH_CONVS
from coordconv_patch.left_behind.watch import check_left_behind, release_watches_
from coordconv_patch.running.inputs import check_is_module
from coordconv_patch.running.untouched import LOOK, copied

__all__ = ["to_concatenated"]


def to_concatenated(model: nn.Module) -> nn.Module:
    """A copy of a patched model whose coordinate convolutions concatenate, of torch's modules.

    Each becomes ``torch.nn.Sequential(coordinates=..., conv=...)``: a GraphModule that appends
    the coordinates of its input, and a convolution of torch.nn with C + K input channels. So do
    transposed ones. A grouped convolution, or one of a subclass (weight-standardised, say), has
    no such form, and becomes a GraphModule with the sum of two, ``conv(x) +
    coord_conv(coordinates)``. The copy can be unpickled without this package, unless the model
    itself has classes of it.

    Args:
        model: A patched model. A layer that is the model itself is replaced as well.

    Returns:
        The copy. It has the same outputs but for rounding; the names in its state_dict are
        others at these layers: ``conv1.weight`` is ``conv1.conv.weight``.

    Raises:
        PatchError: If the model is not patched, or a layer has neither form: coordinates at
            convolution functions or at chosen calls, padding in a subclass's own forward,
            parametrized weights, hooks.
    """
    check_is_module(model)
    with LOOK:
        check_left_behind(model)
        layers = require_coord_layers(model)
        reasons = {name: reason for name, layer in layers.items() if (reason := _obstacle(layer))}
        if reasons:
            raise PatchError(
                "; ".join(f"{name or 'the model'} {reason}" for name, reason in reasons.items())
            )
        copy = copied(model, advice="the concatenating form is a copy")
        release_folding_(copy)
        release_watches_(copy)
        plain: dict[nn.Module | None, nn.Module] = {
            module: _plain_form(module)
            for module in list(copy.modules())
            if isinstance(module, CoordConvNd)
        }
        for parent in list(copy.modules()):
            for name, child in list(parent._modules.items()):
                if child in plain:
                    parent._modules[name] = plain[child]
        return plain.get(copy, copy)


def _obstacle(layer: CoordLayer) -> str:
    """Why a layer has no plain form; empty if it has."""
    if not isinstance(layer, CoordConvNd):
        return "has coordinates at a convolution function, or at chosen calls only"
    if layer.coord_padding != DECLARED:
        return f"pads in the forward of {layer._plain_class.__name__}"
    if parametrize.is_parametrized(layer) or "coord_weight" not in layer._parameters:
        return "is parametrized or pruned: torch.nn.utils.parametrize.remove_parametrizations first"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has hooks, which would see other inputs"
    return ""


def _plain_form(layer: CoordConvNd) -> nn.Module:
    training, is_plain = layer.training, layer._plain_class in TORCH_CONVS
    form = _pair(layer) if layer.groups == 1 and is_plain else _sum(layer)
    return form.train(training)


def _pair(layer: CoordConvNd) -> nn.Module:
    """The published form: the coordinates appended, and one convolution."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    ndim = len(layer.kernel_size)
    weight = layer.concatenated_weight()
    conv = _convolution(layer, weight.shape[0 if layer.transposed else 1], layer.groups, True)
    conv.weight = nn.Parameter(weight, layer.weight.requires_grad)
    conv.bias = layer.bias
    coordinates = coordinate_graph(layer.coords, ndim, dtype, joined=True)
    return nn.Sequential(OrderedDict(coordinates=coordinates, conv=conv))


def _sum(layer: CoordConvNd) -> nn.Module:
    """The convolution as it was, and one of the coordinates, added."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    coords, weight, ndim = layer.coords, layer.coord_weight, len(layer.kernel_size)
    coord_conv = _convolution(layer, weight.shape[0 if layer.transposed else 1], 1, False)
    coord_conv.weight = weight
    revert_(layer)
    holder = nn.Module()
    holder.conv, holder.coord_conv = layer, coord_conv
    holder.coordinates = coordinate_graph(coords, ndim, dtype, joined=False)
    graph = fx.Graph()
    x = graph.placeholder("x")
    branch = graph.call_module("coord_conv", (graph.call_module("coordinates", (x,)),))
    graph.output(graph.call_function(torch.add, (graph.call_module("conv", (x,)), branch)))
    return fx.GraphModule(holder, graph, "SumOfConvolutions")


def _convolution(layer: CoordConvNd, channels: int, groups: int, bias: bool) -> _ConvNd:
    """A convolution of torch.nn with a layer's geometry and other input channels."""
    kinds = {(len(k.__name__), k) for k in TORCH_CONVS if isinstance(layer, k)}
    (_, kind) = min(kinds, key=lambda pair: pair[0])
    more: dict[str, Any] = {"output_padding": layer.output_padding} if layer.transposed else {}
    return kind(
        channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=groups,
        bias=bias and layer.bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",
        **more,
    )
