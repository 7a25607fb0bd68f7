"""The functional convolutions of a graph: F.conv2d, aten.conv2d and their kin."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.branch import BRANCH_NAME, CoordBranch
from coordconv_patch.errors import PatchError
from coordconv_patch.geometry import (
    DECLARED,
    ConvGeometry,
    Padding,
    pad_amounts,
)

__all__ = [
    "ADDITIONS",
    "CONV_SIGNATURES",
    "FunctionInput",
    "branch_of",
    "conv_arguments",
    "function_geometry",
    "function_input",
    "function_nodes",
    "function_site_name",
    "has_exported_branch",
    "is_coordinate_convolution",
    "is_function_site",
    "join_names",
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

CONV_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.conv1d: _CONV_ARGUMENTS,
    F.conv2d: _CONV_ARGUMENTS,
    F.conv3d: _CONV_ARGUMENTS,
    F.conv_transpose1d: _TRANSPOSED_ARGUMENTS,
    F.conv_transpose2d: _TRANSPOSED_ARGUMENTS,
    F.conv_transpose3d: _TRANSPOSED_ARGUMENTS,
    _aten.conv1d.default: _CONV_ARGUMENTS,
    _aten.conv1d.padding: _CONV_ARGUMENTS,
    _aten.conv2d.default: _CONV_ARGUMENTS,
    _aten.conv2d.padding: _CONV_ARGUMENTS,
    _aten.conv3d.default: _CONV_ARGUMENTS,
    _aten.conv3d.padding: _CONV_ARGUMENTS,
    _aten.conv_transpose1d.default: _TRANSPOSED_ARGUMENTS,
    _aten.conv_transpose2d.input: _TRANSPOSED_ARGUMENTS,
    _aten.conv_transpose3d.input: _TRANSPOSED_ARGUMENTS,
    _aten.convolution.default: _CONVOLUTION_ARGUMENTS,
}
"""Functions that are convolutions, with the names of their positional arguments."""


ADDITIONS = (operator.add, _aten.add.Tensor, _aten.add_.Tensor)
"""Functions by which a graph adds a branch to a convolution."""


def conv_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a functional convolution's node, by name."""
    names = CONV_SIGNATURES[node.target]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def function_nodes(prefix: str, module: nn.Module, graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The functional convolutions of a graph by site name.

    Args:
        prefix: Qualified name of the module that the graph belongs to.
        module: That module.
        graph: Its graph.
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
    if not _is_convolution(node):
        return False
    weight = conv_arguments(node).get("weight")
    return (
        isinstance(weight, fx.Node)
        and weight.op == "get_attr"
        and str(weight.target).rpartition(".")[2] == "coord_weight"
    )


def _is_convolution(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in CONV_SIGNATURES


def function_site_name(prefix: str, module: nn.Module, node: fx.Node) -> str:
    """The site name of a functional convolution: after its weight, its branch or its node."""
    weight = conv_arguments(node).get("weight")
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
        found = branch_of(module, node)
        if found is None:
            return join_names(prefix, node.name)
        return join_names(prefix, str(found[1].target).removesuffix(BRANCH_NAME)[:-1])
    # "conv1.weight" names the site conv1, as if conv1 were a module site; where it is one,
    # the functional use of its weight is another site.
    full_name = join_names(prefix, weight.target)
    holder, _, attribute = full_name.rpartition(".")
    own_holder = str(weight.target).rpartition(".")[0]
    if not holder or attribute != "weight" or isinstance(module.get_submodule(own_holder), _ConvNd):
        return full_name
    return holder


def function_geometry(root: nn.Module, node: fx.Node) -> ConvGeometry:
    """The geometry of a functional convolution.

    Raises:
        PatchError: If the graph does not tell it, or its weight is not of floats.
    """
    arguments = conv_arguments(node)
    weight = arguments.get("weight")
    shape, dtype = _shape_and_dtype(root, weight)
    if shape is None:
        raise PatchError(
            "its weight is computed at run time (per sample, perhaps), so its shape is unknown"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise PatchError(f"its weight has dtype {dtype}; coordinates need floats")
    ndim = len(shape) - 2
    name = getattr(node.target, "__name__", str(node.target))
    transposed = bool(arguments.get("transposed", "transpose" in name))
    own = function_input(node)
    numbers: dict[str, Any] = {}
    for key, default in (
        ("stride", 1),
        ("padding", 0),
        ("dilation", 1),
        ("output_padding", 0),
        ("groups", 1),
    ):
        value = arguments.get(key, default)
        parts = value if isinstance(value, (tuple, list)) else [value]
        if any(isinstance(part, fx.Node) for part in parts):
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
        kernel_size=tuple(shape[2:]),
        stride=numbers["stride"],
        padding=numbers["padding"] if own.declared is None else own.declared,
        dilation=numbers["dilation"],
        groups=groups,
        padding_mode=own.padding_mode,
        output_padding=numbers["output_padding"] if transposed else (),
    )


@dataclass(frozen=True)
class FunctionInput:
    """What a functional convolution is given, before its own module pads it.

    A subclass such as Conv2dSame, and ``padding_mode="circular"``, pad by an operation of
    its own. Coordinates are those of the image before it, as for the module itself.

    Attributes:
        node: The input's node.
        padding: How it is padded, where the function's arguments do not say it.
        padding_mode: As torch.nn's convolutions have it.
        declared: The ``padding`` that such a convolution would declare; ``None``: as the
            function's arguments say.
        amounts: The pixels of that padding, ``(before, after)`` per spatial dimension.
    """

    node: fx.Node
    padding: Padding = DECLARED
    padding_mode: str = "zeros"
    declared: str | tuple[int, ...] | None = None
    amounts: tuple[tuple[int, int], ...] = ()


_PADS = (F.pad, _aten.pad.default, _aten.constant_pad_nd.default)


def function_input(node: fx.Node) -> FunctionInput:
    """The input of a functional convolution, and how it is padded.

    Several pads in a row, and the function's own padding, are one where no two of them pad
    the same axis: seamless tiling pads one axis by its other end, and the other by zeros.

    Raises:
        PatchError: If its own module pads it by amounts that are computed at run time.
    """
    arguments = conv_arguments(node)
    source = cast(fx.Node, arguments["input"])
    padding = arguments.get("padding", 0)
    if isinstance(padding, str) and padding != "valid":
        return FunctionInput(source)
    pads: list[_Pad] = []
    inner = source
    while True:
        pad = _pad_at(inner, node)
        if pad is None or not _are_apart([*pads, pad], padding):
            break
        pads.append(pad)
        inner = pad.inner
    if not pads:
        return FunctionInput(source)
    return _as_one(node, inner, pads, padding)


class _Pad(NamedTuple):
    """A node that pads an image."""

    inner: fx.Node
    pairs: tuple[tuple[int, int], ...]
    mode: str


def _pad_at(source: fx.Node, convolution: fx.Node) -> _Pad | None:
    """The pad that a node is, if the module that calls a convolution pads its image by it."""
    if source.target not in _PADS or not _is_part_of(source, convolution):
        return None
    names: tuple[str, ...] = ("input", "pad", "mode", "value")
    if source.target is _aten.constant_pad_nd.default:
        names = ("input", "pad", "value")
    given = dict(zip(names, source.args, strict=False)) | source.kwargs
    flat = cast("Sequence[Any]", given["pad"])
    if isinstance(flat, fx.Node) or any(isinstance(amount, fx.Node) for amount in flat):
        raise PatchError("it pads by amounts that are computed at run time, from the image size")
    mode = str(given.get("mode", "constant")).replace("constant", "zeros")
    if mode == "zeros" and given.get("value"):
        return None  # a border of another value than zero is part of the image
    pairs = tuple((int(a), int(b)) for a, b in zip(flat[::2], flat[1::2], strict=True))[::-1]
    return _Pad(cast(fx.Node, given["input"]), pairs, mode)


def _are_apart(pads: Sequence[_Pad], padding: Any) -> bool:
    """Whether pads, and a function's own padding, leave each other's axes alone."""
    ndim = len(pads[0].pairs)
    own = _spread_zeros(padding, ndim)
    parts = [own, *(pad.pairs for pad in pads)] if any(map(any, own)) else [p.pairs for p in pads]
    if any(len(part) != ndim for part in parts):
        return False
    return all(sum(any(part[axis]) for part in parts) <= 1 for axis in range(ndim))


def _spread_zeros(padding: Any, ndim: int) -> tuple[tuple[int, int], ...]:
    """A function's own padding, which is of zeros, as ``(before, after)`` per dimension."""
    numbers = [0] if isinstance(padding, str) else [int(n) for n in _as_list(padding)] or [0]
    return tuple((n, n) for n in (numbers * ndim if len(numbers) == 1 else numbers))


def _as_one(node: fx.Node, inner: fx.Node, pads: Sequence[_Pad], padding: Any) -> FunctionInput:
    """Pads of different axes, and a function's own, as one padding of the innermost image."""
    ndim = len(pads[0].pairs)
    pairs = _spread_zeros(padding, ndim)
    explicit: tuple[tuple[int, int], ...] = ((0, 0),) * ndim
    modes = ["zeros"] * ndim
    for pad in pads:
        pairs = tuple(b if any(b) else a for a, b in zip(pairs, pad.pairs, strict=True))
        explicit = tuple(b if any(b) else a for a, b in zip(explicit, pad.pairs, strict=True))
        modes = [pad.mode if any(b) else m for m, b in zip(modes, pad.pairs, strict=True)]
    padded = {mode for mode, pair in zip(modes, pairs, strict=True) if any(pair)}
    if padded <= {"zeros"}:
        return FunctionInput(inner, Padding("fixed", pairs), amounts=explicit)
    if len(padded) == 1:
        declared = _declared_padding(node, pairs)
        if declared is not None:
            return FunctionInput(inner, DECLARED, padded.pop(), declared, explicit)
    return FunctionInput(inner, Padding("fixed", pairs, tuple(modes)), amounts=explicit)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_part_of(node: fx.Node, convolution: fx.Node) -> bool:
    """Whether the module that calls the convolution, or a part of it, calls another node."""
    own, other = _module_path(convolution), _module_path(node)
    return own == other or (bool(own) and other.startswith(f"{own}."))


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def _declared_padding(
    node: fx.Node, pairs: Sequence[tuple[int, int]]
) -> str | tuple[int, ...] | None:
    """The ``padding`` attribute of a convolution that pads by these amounts."""
    if all(before == after for before, after in pairs):
        return tuple(before for before, _ in pairs)
    arguments = conv_arguments(node)
    dilation = _as_list(arguments.get("dilation", 1))
    weight = arguments["weight"].meta.get("val")
    if weight is None:
        return None
    kernel_size = tuple(weight.shape[2:])
    amounts = pad_amounts(
        DECLARED,
        (),
        kernel_size=kernel_size,
        stride=(1,) * len(kernel_size),
        dilation=dilation * len(kernel_size) if len(dilation) == 1 else dilation,
        declared="same",
    )
    return "same" if amounts == list(pairs) else None


def _shape_and_dtype(
    root: nn.Module, value: Any
) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    if not isinstance(value, fx.Node):
        return None, None
    if value.op == "get_attr":
        tensor = operator.attrgetter(str(value.target))(root)
        return tuple(tensor.shape), tensor.dtype
    recorded = value.meta.get("val", value.meta.get("tensor_meta"))
    if recorded is None:
        return None, None
    return tuple(int(length) for length in recorded.shape), recorded.dtype


def branch_of(root: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a graph already adds to a functional convolution: the sum's node and the branch's."""
    for user in node.users:
        if user.op != "call_function" or user.target not in ADDITIONS:
            continue
        for other in user.all_input_nodes:
            if other.op == "call_module" and isinstance(
                root.get_submodule(str(other.target)), CoordBranch
            ):
                return user, other
    return None


def has_exported_branch(root: nn.Module, node: fx.Node) -> bool:
    """Whether the model was patched before torch.export made a program of it."""
    weight = conv_arguments(node).get("weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    holder = root.get_submodule(str(weight.target).rpartition(".")[0])
    return isinstance(getattr(holder, "coord_weight", None), Tensor)


def join_names(prefix: str, name: Any) -> str:
    """Qualified name of a part of ``prefix``; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else f"{prefix}{name}"
