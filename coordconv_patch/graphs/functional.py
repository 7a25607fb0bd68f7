"""The functional convolutions of a graph: F.conv2d, aten.conv2d and their kin."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.own_padding import PADS, OwnPadding, pad_arguments, unpadded
from coordconv_patch.layers.branch import CoordBranch, site_of_branch
from coordconv_patch.layers.geometry import CONV_FUNCTIONS, ConvGeometry

__all__ = [
    "ADDITIONS",
    "CALLED_CONVS",
    "CONV_SIGNATURES",
    "FunctionInput",
    "branch_of",
    "call_geometry",
    "conv_arguments",
    "function_geometry",
    "function_input",
    "function_nodes",
    "function_site_name",
    "has_exported_branch",
    "is_coordinate_convolution",
    "is_function_site",
    "join_names",
    "module_path",
    "stored_weight",
    "weight_site_name",
]

_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

_TRANSPOSED_ARGUMENTS = (
    *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
)

_CONVOLUTION_ARGUMENTS = (
    *("input", "weight", "bias", "stride", "padding", "dilation"),
    *("transposed", "output_padding", "groups"),
)

_aten = torch.ops.aten

_CONVS = (
    *(F.conv1d, F.conv2d, F.conv3d),
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
)
_TRANSPOSED_CONVS = (
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    _aten.conv_transpose1d.default,
    *(_aten.conv_transpose2d.input, _aten.conv_transpose3d.input),
)

CONV_SIGNATURES: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(_CONVS, _CONV_ARGUMENTS),
    **dict.fromkeys(_TRANSPOSED_CONVS, _TRANSPOSED_ARGUMENTS),
    _aten.convolution.default: _CONVOLUTION_ARGUMENTS,
}
"""Functions that are convolutions, with the names of their positional arguments."""

CALLED_CONVS: dict[Any, Any] = {
    **{function: function for function in CONV_FUNCTIONS.values()},
    **{
        operator_: function
        for function in CONV_FUNCTIONS.values()
        for packet in [getattr(_aten, function.__name__)]
        for operator_ in (packet, *(getattr(packet, name) for name in packet.overloads()))
        if operator_ is packet or operator_ in CONV_SIGNATURES
    },
}
"""Functions and operators that code calls for a convolution when it runs, and which one of
:mod:`torch.nn.functional` takes the same arguments."""


ADDITIONS = (operator.add, _aten.add.Tensor, _aten.add_.Tensor)
"""Functions by which a graph adds a branch to a convolution."""


def conv_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a functional convolution's node, by name."""
    names = CONV_SIGNATURES[node.target]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def function_nodes(prefix: str, module: nn.Module, graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The functional convolutions in the graph of a module by site name.

    ``prefix`` is the module's qualified name.
    """
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_function_site(node):
            nodes.setdefault(function_site_name(prefix, module, node), []).append(node)
    return nodes


def is_function_site(node: fx.Node) -> bool:
    """Whether a node is a convolution, and not one of a coordinate branch that was exported."""
    return _is_convolution(node) and not is_coordinate_convolution(node)


def is_coordinate_convolution(node: fx.Node) -> bool:
    """Whether a node is the convolution of a coordinate branch that was exported."""
    weight = stored_weight(node) if _is_convolution(node) else None
    return weight is not None and weight.rpartition(".")[2] == "coord_weight"


def _is_convolution(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in CONV_SIGNATURES


def stored_weight(node: fx.Node) -> str | None:
    """Qualified name of a functional convolution's weight; ``None`` if that is computed."""
    weight = conv_arguments(node).get("weight")
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def function_site_name(prefix: str, module: nn.Module, node: fx.Node) -> str:
    """The site name of a functional convolution: after its weight, its branch or its node."""
    weight = stored_weight(node)
    if weight is not None:
        holder = module.get_submodule(weight.rpartition(".")[0])
        return weight_site_name(join_names(prefix, weight), holder)
    added = branch_of(module, node)
    return join_names(prefix, node.name if added is None else site_of_branch(str(added[1].target)))


def weight_site_name(weight: str, holder: nn.Module) -> str:
    """The site name of a functional convolution by a stored weight.

    ``"conv1.weight"`` names the site conv1, as if conv1 were a module site; where it is one,
    the functional use of its weight is another site. ``holder`` is the module that holds the
    weight.
    """
    outer, _, attribute = weight.rpartition(".")
    if not outer or attribute != "weight" or isinstance(holder, _ConvNd):
        return weight
    return outer


def function_geometry(root: nn.Module, node: fx.Node) -> ConvGeometry:
    """The geometry of a functional convolution in a graph.

    A PatchError if the graph does not tell it, or its weight is not of floats.
    """
    arguments = conv_arguments(node)
    shape, dtype = _shape_and_dtype(root, arguments.get("weight"))
    if shape is None:
        raise PatchError(
            "its weight is computed at run time (per sample, perhaps), so its shape is unknown"
        )
    return call_geometry(node.target, arguments, shape, dtype, function_input(node).own)


def call_geometry(
    function: Any,
    arguments: Mapping[str, Any],
    weight_shape: Sequence[int],
    dtype: torch.dtype | None,
    own: OwnPadding,
) -> ConvGeometry:
    """The geometry of one call of a convolution function.

    Args:
        function: One of :data:`CONV_SIGNATURES`.
        arguments: The call's arguments by name; numbers, or nodes of a graph.
        weight_shape: Shape of its weight.
        dtype: The weight's dtype; ``None`` if unknown.
        own: How the code that calls it has padded its input.

    Raises:
        PatchError: If a number is computed at run time, or the weight is not of floats.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise PatchError(f"its weight has dtype {dtype}; coordinates need floats")
    shape = tuple(int(length) for length in weight_shape)
    ndim = len(shape) - 2
    name = getattr(function, "__name__", str(function))
    transposed = bool(arguments.get("transposed", "transpose" in name))
    numbers: dict[str, Any] = {}
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}
    for key, default in defaults.items():
        value = arguments.get(key, default)
        parts = value if isinstance(value, (tuple, list)) else [value]
        if any(isinstance(part, (fx.Node, fx.Proxy)) for part in parts):
            raise PatchError(f"its {key} is computed at run time")
        if key == "groups" or isinstance(value, str):
            numbers[key] = value
        else:
            spread = [int(part) for part in parts] or [default]
            numbers[key] = tuple(spread * ndim if len(spread) == 1 else spread)
    groups = numbers["groups"]
    return ConvGeometry(
        transposed=transposed,
        in_channels=shape[0] if transposed else shape[1] * groups,
        out_channels=shape[1] * groups if transposed else shape[0],
        kernel_size=shape[2:],
        stride=numbers["stride"],
        padding=numbers["padding"] if own.declared is None else own.declared,
        dilation=numbers["dilation"],
        groups=groups,
        padding_mode=own.mode,
        output_padding=numbers["output_padding"] if transposed else (),
    )


@dataclass(frozen=True)
class FunctionInput:
    """A functional convolution's input before its own module pads it, and how that pads it."""

    node: fx.Node
    own: OwnPadding


def function_input(node: fx.Node) -> FunctionInput:
    """The input of a functional convolution in a graph, and how it is padded.

    A PatchError if its own module pads it by amounts that are computed at run time.
    """

    def pad_behind(source: Any) -> dict[str, Any] | None:
        if source.target in PADS and _is_part_of(source, node):
            return pad_arguments(source.target, source.args, source.kwargs)
        return None

    arguments = conv_arguments(node)
    weight = arguments["weight"].meta.get("val")
    kernel_size = None if weight is None else weight.shape[2:]
    ndim = _ndim_of(node.target) if kernel_size is None else len(kernel_size)
    return FunctionInput(*unpadded(arguments, ndim, kernel_size, pad_behind))


def _ndim_of(function: Any) -> int | None:
    """Spatial dimensions of a convolution function, by its name; ``None`` if that tells none."""
    digits = re.search(r"([123])d", str(getattr(function, "__name__", function)))
    return int(digits[1]) if digits else None


def _is_part_of(node: fx.Node, convolution: fx.Node) -> bool:
    """Whether the module that calls the convolution, or a part of it, calls another node."""
    own, other = module_path(convolution), module_path(node)
    return own == other or (bool(own) and other.startswith(f"{own}."))


def module_path(node: fx.Node) -> str:
    """Qualified name of the module whose code made a node of a graph."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def _shape_and_dtype(
    root: nn.Module, value: Any
) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    if not isinstance(value, fx.Node):
        return None, None
    if value.op == "get_attr":
        tensor = operator.attrgetter(str(value.target))(root)
        if isinstance(tensor, UninitializedParameter):
            raise PatchError("its weight is not initialised: run the model once before")
        return tuple(tensor.shape), tensor.dtype
    recorded = value.meta.get("val", value.meta.get("tensor_meta"))
    if recorded is None:
        return None, None
    return tuple(int(length) for length in recorded.shape), recorded.dtype


def branch_of(root: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a graph already adds to a functional convolution: the sum's node and the branch's."""
    for user in node.users:
        if user.op == "call_function" and user.target in ADDITIONS:
            for other in user.all_input_nodes:
                name = str(other.target)
                if other.op == "call_module" and isinstance(root.get_submodule(name), CoordBranch):
                    return user, other
    return None


def has_exported_branch(root: nn.Module, node: fx.Node) -> bool:
    """Whether the model was patched before torch.export made a program of it."""
    weight = stored_weight(node)
    if weight is None:
        return False
    holder = root.get_submodule(weight.rpartition(".")[0])
    return isinstance(getattr(holder, "coord_weight", None), Tensor)


def join_names(prefix: str, name: Any) -> str:
    """Qualified name of a part of ``prefix``; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else f"{prefix}{name}"
