"""Fold batch norms into the convolutions before them, coordinates included.

With s = gamma / sqrt(running_var + eps), per output channel::

    BN(conv(x, W) + b + conv(c, W_c)) = conv(x, s W) + s (b - running_mean) + beta + conv(c, s W_c)

The branch is linear, so scaling its weight alike is exact up to rounding. Exporters and
runtimes fold a batch norm only into a convolution right before it: the addition of a
coordinate map between the two would stop them, and cost a batch norm at run time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from coordconv_patch.errors import PatchError
from coordconv_patch.folding.baked_maps import bake_maps_
from coordconv_patch.folding.other_libraries import release_folding_
from coordconv_patch.graphs.functional import join_names
from coordconv_patch.graphs.norms import is_batch_norm, norm_affine
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import TORCH_CONVS
from coordconv_patch.layers.padding_probe import ConvSpy
from coordconv_patch.left_behind.watch import check_left_behind, release_watches_, watch_
from coordconv_patch.running.inputs import check_has_values, check_is_module, check_not_scripted
from coordconv_patch.running.untouched import copied
from coordconv_patch.sites.regions import Region, trace_regions

__all__ = ["Folding", "fold", "fold_batch_norms_"]


@dataclass(frozen=True)
class Folding:
    """What became of a batch norm: the convolution that it went into, or an obstacle."""

    norm: str
    convolution: str = ""
    obstacle: str = ""


def fold(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A copy of a model for inference: batch norms folded, coordinate maps constant.

    Each batch norm right after a convolution goes into it; where that cannot be done the
    batch norm stays, and outputs are the same either way, up to rounding. Coordinate
    layers keep their maps without looking at their weights again, on every device, so do
    not change weights afterwards: fold the trained model anew.

    With example inputs the copy is for their image size alone, at any batch size: each coordinate
    map is a buffer ``coord_map`` in the place of ``coord_weight``, and nothing of this package is
    left in the model. So its pickles load where coordconv_patch is not installed, and
    torch.jit.script takes it if it takes the plain model.

    Args:
        model: Any model, patched or not; it is not changed.
        example_inputs: Inputs of the image size to fold for: a tensor such as ``(N, C, H, W)``, or
            a tuple of arguments with keyword arguments as a dict at its end. ``None``: the copy
            takes any size, and is of this package's classes.

    Returns:
        The copy, in evaluation mode, with gradients off.

    Raises:
        PatchError: If the model is not a module, or cannot be deep-copied, or if other code has
            left coordinates behind; with example inputs, if a layer runs at several sizes or not
            at all, or if coordinates are added by the code of a module that calls functions.
        ExampleInputsError: If the model fails on the example inputs.
    """
    check_is_module(model)
    check_not_scripted(model, PatchError, "fold the model that it was made of, before scripting")
    check_has_values(model)
    check_left_behind(model)
    folded = copied(model, advice="folding works on a copy")
    release_watches_(folded)
    folded.eval()
    fold_batch_norms_(folded)
    release_folding_(folded)
    for layer in coord_layers(folded).values():
        layer.keep_maps_constant_()
    folded.requires_grad_(False)
    if example_inputs is not None:
        return bake_maps_(folded, example_inputs)
    watch_(folded)
    return folded


def fold_batch_norms_(model: nn.Module) -> tuple[Folding, ...]:
    """Fold every batch norm that can be folded, in place; the model is in evaluation mode.

    Returns what became of each batch norm that a traced graph runs.
    """
    regions = tuple(trace_regions(model).by_name.values())
    uses = Counter(
        id(_module(region, node))
        for region in regions
        for node in region.graph.find_nodes(op="call_module")
    )
    holders = _parameter_holders(model, regions)
    done = []
    for region in regions:
        for node in list(region.graph.nodes):
            norm = _module(region, node)
            if norm is not None and is_batch_norm(norm):
                done.append(_fold_one_(model, region, node, norm, uses, holders))
    return tuple(done)


def _parameter_holders(model: nn.Module, regions: Sequence[Region]) -> Counter[int]:
    """How many modules and graph nodes hold each parameter, by its identity."""
    held = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    for region in regions:
        for node in region.graph.find_nodes(op="get_attr"):
            with contextlib.suppress(AttributeError):  # a buffer, or what is not a parameter
                held.append(region.module.get_parameter(str(node.target)))
    return Counter(map(id, held))


def _module(region: Region, node: fx.Node) -> nn.Module | None:
    if node.op != "call_module":
        return None
    return region.module.get_submodule(str(node.target))


def _fold_one_(
    model: nn.Module,
    region: Region,
    node: fx.Node,
    norm: nn.Module,
    uses: Mapping[int, int],
    holders: Mapping[int, int],
) -> Folding:
    name = join_names(region.name, str(node.target))
    before = node.args[0] if node.args else None
    conv = _module(region, before) if isinstance(before, fx.Node) else None
    if not isinstance(before, fx.Node) or not isinstance(conv, _ConvNd):
        return Folding(name, obstacle="no convolution module comes right before it")
    try:
        if len(before.users) > 1:
            raise PatchError("the convolution's output has other users")
        if uses[id(conv)] > 1 or uses[id(norm)] > 1:
            raise PatchError("the convolution or the batch norm is called several times")
        if any(holders[id(parameter)] > 1 for parameter in conv.parameters()):
            raise PatchError("the convolution shares parameters with something else")
        if _has_hooks(norm) or _has_hooks(conv):
            raise PatchError("the convolution or the batch norm has hooks")
        affine = norm_affine(norm)
        _check_plain_weight(conv)
    except PatchError as error:
        return Folding(name, obstacle=str(error))
    _scale_(conv, affine.scale, affine.shift)
    _replace(model, norm, affine.rest)
    return Folding(name, convolution=join_names(region.name, str(before.target)))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _check_plain_weight(conv: _ConvNd) -> None:
    """Check that a convolution's output is linear in its weight and moves with its bias.

    A PatchError if its class computes the weight from something else.
    """
    if parametrize.is_parametrized(conv):
        raise PatchError("the convolution is parametrized")
    plain = conv._plain_class if isinstance(conv, CoordConvNd) else type(conv)
    if plain in TORCH_CONVS:
        return
    pairs = zip(conv.dilation, conv.kernel_size, strict=True)
    size = [2 * (dilation * (kernel - 1) + 1) for dilation, kernel in pairs]
    sample = conv.weight.new_zeros(1, conv.in_channels, *size)
    with torch.no_grad(), ConvSpy(conv) as spy:
        plain.forward(conv, sample)
    weights = [args[1] if len(args) > 1 else kwargs["weight"] for args, kwargs, *_ in spy.calls]
    if not weights or any(weight is not conv.weight for weight in weights):
        raise PatchError(f"{plain.__name__} computes its weight anew in every forward pass")


@torch.no_grad()
def _scale_(conv: _ConvNd, scale: Tensor, shift: Tensor) -> None:
    """Scale a convolution's output channels and shift them, its coordinate branch included."""
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(shift)
    new_bias = (bias * scale + shift).to(conv.weight.dtype)
    if conv.bias is None:
        conv.bias = nn.Parameter(new_bias, requires_grad=conv.weight.requires_grad)
    else:
        conv.bias.copy_(new_bias)
    spatial = (1,) * len(conv.kernel_size)
    if conv.transposed:
        # (C_in, C_out / groups, ...): the rows of a group's input channels lead to its outputs.
        per_group = scale.view(conv.groups, -1).repeat_interleave(
            conv.in_channels // conv.groups, dim=0
        )
        conv.weight.copy_(conv.weight.double() * per_group.view(*per_group.shape, *spatial))
    else:
        conv.weight.copy_(conv.weight.double() * scale.view(-1, 1, *spatial))
    if isinstance(conv, CoordConvNd):
        shape = (1, -1, *spatial) if conv.transposed else (-1, 1, *spatial)
        conv.coord_weight.copy_(conv.coord_weight.double() * scale.view(shape))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    new.training = old.training
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
