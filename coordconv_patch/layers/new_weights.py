"""What it means when a coordinate convolution is given another weight Parameter.

Several kinds of tools do that, and none knows the coordinate weight: code that folds batch
norms scales each output channel; pruning tools drop channels or set weights to zero; rules for
layer-wise relevance propagation put a changed weight in place for the time of one pass. The
numbers tell which it was, and so what to write instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coordconv_patch.layers.weight_marks import rows_of

__all__ = ["why_refused"]


@torch.no_grad()
def why_refused(old: Tensor, new: Tensor, *, transposed: bool, groups: int) -> str:
    """Why a new weight would leave trained coordinates behind, and what to write instead.

    Args:
        old: The weight that the layer has.
        new: The one that it is about to get.
        transposed: Whether the convolution is a transposed one.
        groups: Its groups.

    Returns:
        Sentences for a message; empty if the coordinates go on to fit: the same values, some
        of them set to zero, or fewer input channels.
    """
    before = rows_of(old, transposed=transposed, groups=groups)
    after = rows_of(new, transposed=transposed, groups=groups).to(before.device)
    if before.shape == after.shape:
        before = before.to(after.dtype)
        if bool(((after == before) | (after == 0)).all()):
            return ""
        return _SCALED if _is_scaled(before, after) else _OTHER
    if before.shape[2:] == after.shape[2:] and len(before) == len(after) and groups == 1:
        # Coordinates are input channels of their own: they stay when others go.
        return "" if _are_some_of(after.transpose(0, 1), before.transpose(0, 1)) else _OTHER
    return _CHANNELS.format(before=tuple(old.shape), after=tuple(new.shape))


_SCALED = (
    "Each of its output channels was scaled, as by code that folds a batch norm into the "
    "convolution; the coordinate weight has to be scaled too: let coordconv_patch.fold_with("
    "model, function) call that code"
)
_CHANNELS = (
    "Its shape goes from {before} to {after}, as by a tool that prunes channels; the coordinate "
    "weight would keep the output channels that it has: save_coords(...) and unpatch(model, "
    "discard=True), prune the plain model, patch it anew and fine-tune"
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


def _are_some_of(chosen: Tensor, channels: Tensor) -> bool:
    """Whether these channels are some of those, in the same order."""
    remaining = iter(channels)
    return all(any(torch.equal(each, other) for other in remaining) for each in chosen)
