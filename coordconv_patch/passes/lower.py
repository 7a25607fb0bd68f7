"""Lower the coordinate branch to the form that it takes in an exported graph.

With x the input, c the coordinates of its size, W and W_c the weights::

    channels   conv([x ; c], [W ; W_c])         c constant; the published CoordConv
    map        conv(x, W) + m                   m = conv(c, W_c) constant
    branch     conv(x, W) + conv(c * 1_N, W_c)  c constant, expanded to the batch
    computed   conv(x, W) + conv(c(x), W_c)     c from x's size at run time

All four are the same sum; they differ in what a runtime can fuse. The pass works
on a copy that is made for export: it replaces each layer's forward on the
instance, so that parameter names, and with them initializer names, stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coordconv_patch.branch import CoordBranch, coordinate_map, grid_for, pad_grid
from coordconv_patch.errors import ExportError
from coordconv_patch.geometry import CONV_FUNCTIONS
from coordconv_patch.layers import CoordConvNd, coord_layers
from coordconv_patch.recording import Call, record_calls

__all__ = ["LOWERINGS", "Lowered", "Lowering", "lower_"]

Lowering = Literal["channels", "map", "branch", "computed"]
LOWERINGS: tuple[str, ...] = get_args(Lowering)


@dataclass(frozen=True)
class Lowered:
    """What a lowering did.

    Attributes:
        lowerings: The form that each site that is called got, by site name.
        constants: The coordinate constants that the graph will hold, each once.
    """

    lowerings: dict[str, Lowering]
    constants: tuple[Tensor, ...]


def lower_(model: nn.Module, example_inputs: Any, choose: Callable[[str], Lowering]) -> Lowered:
    """Replace the branch of every coordinate layer by its lowered form, in place.

    The model can run afterwards at the sizes of the example only, except where the
    lowering is ``"computed"``; meant for a copy that is about to be exported.

    Args:
        model: A patched model, in the mode in which it will be exported.
        example_inputs: As for :func:`coordconv_patch.plan`; they fix the sizes.
        choose: Gives each site's lowering by its name.

    Layers that are not called on the example inputs stay as they are.

    Raises:
        ExportError: If a layer cannot take the form that was chosen for it.
        PatchError: If the model fails on the example inputs.
    """
    layers = coord_layers(model)
    lowerings = {name: choose(name) for name in layers}
    calls = record_calls(model, example_inputs, layers, ())
    shared: dict[Any, Tensor] = {}
    constants: dict[int, Tensor] = {}
    for name, layer in layers.items():
        if lowerings[name] == "computed" or name not in calls:
            continue
        made = {
            call: _constant(layer, lowerings[name], call, shared)
            for call in dict.fromkeys(calls[name])
        }
        for index, tensor in enumerate(made.values()):
            layer.register_buffer(f"coord_constant_{index}", tensor, persistent=False)
            constants[id(tensor)] = tensor
        _replace_forward(name, layer, lowerings[name], made)
    called = {name: form for name, form in lowerings.items() if name in calls}
    return Lowered(called, tuple(constants.values()))


@torch.no_grad()
def _constant(
    layer: CoordConvNd | CoordBranch, lowering: Lowering, call: Call, shared: dict[Any, Tensor]
) -> Tensor:
    """The map, or the padded coordinate channels, for one call; grids are shared by value."""
    if lowering == "map":
        output_padding = (
            layer.output_padding_of(call.input_size, call.output_size)
            if isinstance(layer, CoordConvNd)
            else layer.geometry.output_padding
        )
        return layer.compute_branch(call.input_size, output_padding)
    grid = _padded(layer, grid_for(layer.coord_weight, layer.coords, call.input_size))
    key = (layer.coords, tuple(grid.shape), call.input_size, grid.dtype, _pad_key(layer))
    return shared.setdefault(key, grid)


def _padded(layer: CoordConvNd | CoordBranch, grid: Tensor) -> Tensor:
    if isinstance(layer, CoordBranch) or layer.transposed:
        return grid
    padded, _ = pad_grid(
        grid,
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        rule=layer.coord_padding,
    )
    return padded


def _pad_key(layer: CoordConvNd | CoordBranch) -> Any:
    if isinstance(layer, CoordBranch):
        return None
    return (layer.coord_padding, layer.padding_mode)


def _replace_forward(
    name: str,
    layer: CoordConvNd | CoordBranch,
    lowering: Lowering,
    constants: Mapping[Call, Tensor],
) -> None:
    def constant_for(source: Tensor, output: Sequence[int] | None = None) -> Tensor:
        ndim = layer.coord_weight.dim() - 2
        wanted = [int(length) for length in source.shape[-ndim:]]
        for call, tensor in constants.items():
            if list(call.input_size) == wanted and (
                output is None
                or list(call.output_size) == [int(length) for length in output[-ndim:]]
            ):
                return tensor
        raise ExportError(
            f"{name} is called at size {tuple(wanted)}, but was at "
            f"{[call.input_size for call in constants]} on the example inputs"
        )

    if isinstance(layer, CoordBranch):
        if lowering == "channels":
            raise ExportError(
                f"{name} is a functional convolution, which has no 'channels' lowering here: "
                "choose 'branch' or 'map'"
            )
        layer.forward = functools.partial(  # type: ignore[method-assign]
            _branch_forward, layer, lowering, constant_for
        )
    elif lowering == "channels":
        layer.forward = functools.partial(  # type: ignore[method-assign]
            _channels_forward, layer, constant_for
        )
    else:
        layer.forward = functools.partial(  # type: ignore[method-assign]
            _sum_forward, layer, lowering, constant_for
        )


def _branch_forward(
    layer: CoordBranch, lowering: Lowering, constant_for: Callable[..., Tensor], input: Tensor
) -> Tensor:
    constant = constant_for(input)
    geometry = layer.geometry
    batched = input.dim() == geometry.ndim + 2
    if lowering == "map":
        branch = constant
    else:
        grid = _expanded(constant, input) if batched else constant
        branch = layer.compute_branch(input.shape[-geometry.ndim :], geometry.output_padding, grid)
    return branch if batched else branch.squeeze(0)


def _sum_forward(
    layer: CoordConvNd,
    lowering: Lowering,
    constant_for: Callable[..., Tensor],
    input: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    output = layer._plain_class.forward(layer, input, *args, **kwargs)
    constant = constant_for(input, output.shape)
    batched = output.dim() == constant.dim()
    if lowering == "map":
        branch = constant
    else:
        grid = _expanded(constant, input) if batched else constant
        branch = _convolve_padded(layer, grid, input, output)
    return output + (branch if batched else branch.squeeze(0))


def _expanded(constant: Tensor, input: Tensor) -> Tensor:
    return constant.expand(input.shape[0], *constant.shape[1:])


def _convolve_padded(layer: CoordConvNd, grid: Tensor, input: Tensor, output: Tensor) -> Tensor:
    """The branch on coordinate channels that are padded already where the layer pads by itself."""
    ndim = len(layer.kernel_size)
    padded_here = layer.coord_padding.rule != "declared" or layer.padding_mode != "zeros"
    return coordinate_map(
        grid,
        layer.coord_weight,
        transposed=layer.transposed,
        stride=layer.stride,
        padding=(0,) * ndim if padded_here else layer.padding,
        dilation=layer.dilation,
        output_padding=layer.output_padding_of(input.shape[-ndim:], output.shape),
    )


def _channels_forward(
    layer: CoordConvNd,
    constant_for: Callable[..., Tensor],
    input: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    with _ConcatenateCoordinates(layer, constant_for(input)):
        return cast(Tensor, layer._plain_class.forward(layer, input, *args, **kwargs))


class _ConcatenateCoordinates(TorchFunctionMode):
    """While entered, the layer's convolution call gets the coordinates as further input channels.

    The class's own forward decides padding and weight (standardised, say), so it
    runs as it is; only the call that it makes in the end is widened.
    """

    def __init__(self, layer: CoordConvNd, grid: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.grid = grid
        self.function = CONV_FUNCTIONS[len(layer.kernel_size), layer.transposed]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not self.function:
            return func(*args, **(kwargs or {}))
        names = ("input", "weight", "bias", "stride", "padding")
        call = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        rest = args[len(names) :]
        input, weight = call.pop("input"), call.pop("weight")
        groups, ndim = self.layer.groups, len(self.layer.kernel_size)
        batched = input.dim() == ndim + 2
        input = input if batched else input.unsqueeze(0)
        grid = self.grid.expand(input.shape[0], *self.grid.shape[1:])
        coord_weight: Tensor = self.layer.coord_weight
        if groups > 1:
            input = _with_coordinates_in_each_group(input, grid, groups)
            if self.layer.transposed:
                coord_weight = _spread_over_groups(coord_weight, groups)
                weight = weight.reshape(groups, -1, *weight.shape[1:])
                weight = torch.cat((weight, coord_weight), dim=1).flatten(0, 1)
        else:
            input = torch.cat((input, grid), dim=1)
            if self.layer.transposed:
                weight = torch.cat((weight, coord_weight), dim=0)
        if not self.layer.transposed:
            weight = torch.cat((weight, coord_weight), dim=1)
        positional = [call.pop(name) for name in names[2:]] if rest else []
        output = func(input, weight, *positional, *rest, **call)
        return output if batched else output.squeeze(0)


def _with_coordinates_in_each_group(input: Tensor, grid: Tensor, groups: int) -> Tensor:
    """(N, C, ...) to (N, groups * (C / groups + K), ...): each group sees the coordinates last."""
    grouped = input.reshape(input.shape[0], groups, -1, *input.shape[2:])
    repeated = grid.unsqueeze(1).expand(-1, groups, *grid.shape[1:])
    return torch.cat((grouped, repeated), dim=2).flatten(1, 2)


def _spread_over_groups(coord_weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's (K, C_out, ...) to (groups, K, C_out / groups, ...)."""
    channels = coord_weight.shape[0]
    return coord_weight.reshape(channels, groups, -1, *coord_weight.shape[2:]).transpose(0, 1)
