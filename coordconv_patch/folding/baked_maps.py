"""Coordinate maps as buffers: a folded model for one image size, which needs torch alone.

Each coordinate layer becomes a ``torch.fx.GraphModule`` of a few torch functions::

    input -> check of its size -> pad and convolve -> add the buffer coord_map

torch pickles such a module as its code, so a pickle names no class of this package. Weights keep
their names; in the place of each ``coord_weight`` stands a ``coord_map``.
"""

from __future__ import annotations

import contextlib
import io
import operator
import pickle
import pickletools
from typing import Any, Optional

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.conversion import revert_
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import CONV_FUNCTIONS, TORCH_CONVS
from coordconv_patch.running.inputs import run_model
from coordconv_patch.running.untouched import evaluation

__all__ = ["bake_maps_"]

_PACKAGE = __name__.partition(".")[0]
_INSTEAD = (
    ": call fold without example inputs; what torch.export saves of that needs no coordconv_patch"
)


def bake_maps_(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Put a module of torch's classes in the place of each coordinate layer.

    Args:
        model: A folded model, in evaluation mode, whose coordinate maps are constant.
        example_inputs: Inputs of the image size that the model is for; see ``export_onnx``.

    Returns:
        The model; another module if it was a coordinate layer itself.

    Raises:
        ExampleInputsError: If the model fails on the inputs.
        PatchError: If a layer has no map of its own for this size, or if the model would still
            need this package. The model is not to be used then.
    """
    layers = coord_layers(model)
    for layer in layers.values():
        layer._map_cache.clear()
    with evaluation(model):
        run_model(model, example_inputs)
    baked = {id(layer): _baked(name, layer) for name, layer in layers.items()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in baked:
                parent._modules[name] = baked[id(child)]
    model = baked.get(id(model), model)
    _check_needs_torch_alone(model)
    return model


def _baked(name: str, layer: CoordLayer) -> nn.Module:
    """What takes a coordinate layer's place: the convolution and its map, or the map alone."""
    name = name or "the convolution"
    input_size, output_size, coord_map = _only_map(name, layer)
    graph = fx.Graph()
    image = graph.placeholder("input", type_expr=Tensor)
    holder = nn.Module()
    holder.register_buffer("coord_map", coord_map)
    convolution = layer if isinstance(layer, CoordConvNd) else None
    if convolution is not None and convolution.transposed:
        # It is called with an output size, perhaps: the one of the example.
        graph.placeholder("output_size", type_expr=_SIZE, default_value=None)
    _check_size(graph, image, input_size, name)
    result = graph.get_attr("coord_map")
    if convolution is not None:
        output_padding = convolution.output_padding_of(input_size, output_size)
        output = _convolution(graph, image, convolution, holder, output_padding)
        result = graph.call_function(torch.add, (output, result))
    graph.output(result, type_expr=Tensor)
    baked = fx.GraphModule(holder, graph, class_name=type(layer).__name__)
    for constant in _ATTRIBUTES & vars(layer).keys():  # which the code around may read
        setattr(baked, constant, getattr(layer, constant))
    return baked.eval()


_SIZE: Any = Optional[list[int]]  # noqa: UP045 -- as torch.jit.script reads it on every Python
_ATTRIBUTES = frozenset(
    {"in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"}
    | {"padding_mode", "output_padding", "transposed"}
)


def _only_map(name: str, layer: CoordLayer) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    """The input size, the output size and the map of a layer that ran at one size."""
    if layer.chosen_calls is not None:
        raise PatchError(f"only some calls of {name} have coordinates{_INSTEAD}")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise PatchError(f"{name} has hooks, which cannot go with it: remove them before")
    maps = layer._map_cache.kept_maps()
    if not maps:
        raise PatchError(
            f"{name} did not run on the example inputs (or not as a module), so that the size of "
            f"its coordinates is not known{_INSTEAD}"
        )
    if len(maps) > 1:
        sizes = " and ".join(sorted({" x ".join(map(str, key.input_size)) for key in maps}))
        raise PatchError(f"{name} runs at several sizes or in several dtypes ({sizes}){_INSTEAD}")
    ((key, coord_map),) = maps.items()
    return key.input_size, key.output_size, coord_map.detach().clone()


def _check_size(graph: fx.Graph, image: fx.Node, size: tuple[int, ...], name: str) -> None:
    """Another size must not get these coordinates, which broadcasting might stretch."""
    wanted = " x ".join(map(str, size))
    message = f"{name} was folded for inputs of {wanted}: fold the model for this size too"
    for dim, pixels in enumerate(size):
        given = graph.call_method("size", (image, dim - len(size)))
        is_right = graph.call_function(operator.eq, (given, pixels))
        graph.call_function(torch._assert, (is_right, message))


def _convolution(
    graph: fx.Graph,
    image: fx.Node,
    layer: CoordConvNd,
    holder: nn.Module,
    output_padding: tuple[int, ...],
) -> fx.Node:
    """The plain convolution: as a torch function, or the module of another class, as ``conv``."""
    if layer._plain_class not in TORCH_CONVS or parametrize.is_parametrized(layer):
        if layer.transposed and output_padding != tuple(layer.output_padding):
            raise PatchError(
                f"{layer.site_name} is called with an output size of its own{_INSTEAD}"
            )
        revert_(layer)
        for tensor in list(getattr(layer, "parametrizations", ())):  # torch pickles none of these
            parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)
        layer.requires_grad_(False)
        holder.add_module("conv", layer)
        return graph.call_module("conv", (image,))
    holder.register_parameter("weight", layer._parameters["weight"])
    holder.register_parameter("bias", layer._parameters["bias"])
    weight = graph.get_attr("weight")
    bias = None if layer.bias is None else graph.get_attr("bias")
    convolve = CONV_FUNCTIONS[len(layer.kernel_size), layer.transposed]
    padding = layer.padding
    if layer.transposed:
        terms: tuple[Any, ...] = (padding, output_padding, layer.groups, layer.dilation)
    else:
        if layer.padding_mode != "zeros":
            amounts = layer._reversed_padding_repeated_twice
            image = graph.call_function(nn.functional.pad, (image, amounts, layer.padding_mode))
            padding = (0,) * len(layer.kernel_size)
        terms = (padding, layer.dilation, layer.groups)
    return graph.call_function(convolve, (image, weight, bias, layer.stride, *terms))


def _check_needs_torch_alone(model: nn.Module) -> None:
    """Check that a pickle of a model names nothing of this package."""
    names = io.BytesIO()
    # What cannot be pickled anyway needs no check.
    with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):
        _WithoutTensors(names, protocol=4).dump(model)
    for _, value, _ in pickletools.genops(names.getvalue() or b"."):
        if isinstance(value, str) and value.partition(".")[0] == _PACKAGE:
            raise PatchError(
                f"the model holds something of {value}, as modules do whose code calls "
                f"convolution functions, and parts of detectors{_INSTEAD}"
            )


class _WithoutTensors(pickle.Pickler):
    """Pickles a model's structure; for each tensor a placeholder."""

    def persistent_id(self, value: Any) -> str | None:
        return "tensor" if isinstance(value, Tensor) else None
