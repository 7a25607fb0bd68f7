"""What it means when a coordinate convolution is given another weight Parameter.

Several kinds of tools do that, and none knows the coordinate weight: code that folds batch
norms scales each output channel; pruning tools drop channels or set weights to zero; rules for
layer-wise relevance propagation put a changed weight in place for the time of one pass. The
numbers tell which it was: where output channels were dropped, the coordinate weight drops the
same ones; otherwise what to write instead is told.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coordconv_patch.layers.weight_marks import rows_of

__all__ = ["coords_with", "groups_of", "rows_of_each", "why_refused"]


def groups_of(weight: Tensor, old: Tensor, coord_weight: Tensor, *, transposed: bool) -> int:
    """The groups of a convolution with a weight, whatever its ``groups`` says at the moment.

    A tool that prunes a depthwise convolution changes its weight and its groups one by one.

    Args:
        weight: The weight.
        old: The weight that belongs to the coordinate weight: the same, or that before a pruning.
        coord_weight: The coordinate weight, of all output channels of ``old``.
        transposed: Whether the convolution is a transposed one. How the weight of another stands
            by output channel does not depend on its groups, and 1 is returned.
    """
    if not transposed:
        return 1
    groups = coord_weight.shape[1] // old.shape[1]
    return weight.shape[0] if groups == old.shape[0] else groups


def rows_of_each(
    old: Tensor, new: Tensor, coord_weight: Tensor, *, transposed: bool
) -> tuple[Tensor, Tensor]:
    """The weight that a layer has, and the one that it is about to get, by output channel.

    Args:
        old: The weight that the layer has.
        new: The one that it is about to get.
        coord_weight: The coordinate weight, as of :class:`coordconv_patch.CoordConv2d`.
        transposed: Whether the convolution is a transposed one.

    Returns:
        Each of shape ``(C_out, C_in / groups, *kernel_size)``, on one device.
    """
    before, after = (
        rows_of(
            weight,
            transposed=transposed,
            groups=groups_of(weight, old, coord_weight, transposed=transposed),
        )
        for weight in (old, new)
    )
    return before, after.to(before.device)


@torch.no_grad()
def coords_with(
    before: Tensor, after: Tensor, coord_weight: nn.Parameter, *, transposed: bool
) -> nn.Parameter | None:
    """The coordinate weight, and its gradient, for a weight of other output channels.

    Args:
        before: The weight that the layer has, by output channel.
        after: The one that it is about to get, likewise.
        coord_weight: The coordinate weight, as of :class:`coordconv_patch.CoordConv2d`.
        transposed: Whether the convolution is a transposed one.

    Returns:
        Of the channels that the weight keeps, those of the coordinate weight; zeros where it was
        zero. ``None`` if their number is the same, or if it cannot be told which are kept: they
        are not some of those before, or several have equal weights and different coordinates.
    """
    dim = 1 if transposed else 0
    if coord_weight.shape[dim] != len(before) or len(after) == len(before):
        return None
    kept = _places(after, before)
    # Channels of equal weights can be told apart by their order only, if at all.
    turned = _places(after.flip(0), before.flip(0))
    if kept is None or turned is None:
        return None if coord_weight.any() else _zeros(coord_weight, dim, len(after))
    latest = [len(before) - 1 - place for place in reversed(turned)]
    index, other = (torch.tensor(at, device=coord_weight.device) for at in (kept, latest))
    values = coord_weight.index_select(dim, index)
    if not torch.equal(values, coord_weight.index_select(dim, other)):
        return None
    pruned = nn.Parameter(values, coord_weight.requires_grad)
    if coord_weight.grad is not None:
        pruned.grad = coord_weight.grad.index_select(dim, index)
    return pruned


def _zeros(coord_weight: nn.Parameter, dim: int, count: int) -> nn.Parameter:
    shape = list(coord_weight.shape)
    shape[dim] = count
    return nn.Parameter(coord_weight.new_zeros(shape), coord_weight.requires_grad)


@torch.no_grad()
def why_refused(before: Tensor, after: Tensor) -> str:
    """Why a new weight would leave trained coordinates behind, and what to write instead.

    Args:
        before: The weight that the layer has, by output channel, see
            :func:`coordconv_patch.layers.weight_marks.rows_of`.
        after: The one that it is about to get, likewise.

    Returns:
        Sentences for a message; empty if the coordinates go on to fit: the same values, some
        of them set to zero, or fewer input channels.
    """
    if before.shape == after.shape:
        before = before.to(after.dtype)
        if bool(((after == before) | (after == 0)).all()):
            return ""
        return _SCALED if _is_scaled(before, after) else _OTHER
    if before.shape[2:] == after.shape[2:] and len(before) == len(after):
        # Coordinates are input channels of their own: they stay when others go.
        places = _places(after.transpose(0, 1), before.transpose(0, 1))
        return _OTHER if places is None else ""
    if _places(after, before) is None:
        return _CHANNELS.format(before=len(before), after=len(after))
    return _ALIKE.format(before=len(before), after=len(after))


_SCALED = (
    "Each of its output channels was scaled, as by code that folds a batch norm into the "
    "convolution; the coordinate weight has to be scaled too: let coordconv_patch.fold_with("
    "model, function) call that code"
)
_CHANNELS = (
    "It would have {after} output channels instead of {before}, and they are not some of those "
    "that it has, in their order, so the coordinate weight cannot follow: save_coords(...) and "
    "unpatch(model, discard=True), change the plain model, patch it anew and fine-tune"
)
_ALIKE = (
    "It would have {after} output channels instead of {before}, and several of those have equal "
    "weights and different coordinates, so which of them stay cannot be told. Make them differ "
    "before: with torch.no_grad(): layer.weight.add_(1e-6 * torch.randn_like(layer.weight))"
)
_OTHER = (
    "Its values are others, as by a tool that works with changed weights (an LRP rule) or that "
    "computes new ones; it would leave the coordinate weight as it is. To explain the model "
    "without coordinates, give the tool unpatch(model, discard=True), and to explain them too, "
    "convolutions with layer.concatenated_weight(). If the new weight is meant to stand beside "
    "these coordinates: with torch.no_grad(): layer.weight.copy_(new)"
)


def _is_scaled(before: Tensor, after: Tensor) -> bool:
    """Whether every output channel is a multiple of what it was."""
    before, after = before.double().flatten(1), after.double().flatten(1)
    if before.shape[1] < 2:
        return True  # one weight each: it is a multiple in any case
    factor = (before * after).sum(1) / before.square().sum(1).clamp_min(1e-300)
    rest = (after - before * factor.unsqueeze(1)).norm(dim=1)
    return bool((rest <= 1e-2 * after.norm(dim=1)).all())


def _places(chosen: Tensor, channels: Tensor) -> list[int] | None:
    """Where these channels stand among those, in the same order, each as early as can be."""
    if chosen.shape[1:] != channels.shape[1:]:
        return None
    places: list[int] = []
    remaining = iter(range(len(channels)))
    for each in chosen:
        place = next((i for i in remaining if torch.equal(each, channels[i])), None)
        if place is None:
            return None
        places.append(place)
    return places
