"""The user's loss function and batches: what goes wrong with them is told by their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coordconv_patch.arguments import check_callable, given
from coordconv_patch.errors import ArgumentError, CoordConvPatchError, PatchError, first_line
from coordconv_patch.running.inputs import describe_inputs, tensors_in

__all__ = ["LossFunction", "check_loss_fn", "finite_loss", "iterated", "loss_of", "not_finite_in"]

LossFunction = Callable[[nn.Module, Any], Any]
"""Gets a model and a batch, gives one number."""

_AS_CALLED = "it is called as loss_fn(model, batch)"


def check_loss_fn(loss_fn: Any) -> None:
    """Check that an argument can be a loss function.

    Raises:
        ArgumentError: If it cannot be called, or is a class of losses, whose call would make one.
    """
    check_callable("loss_fn", loss_fn)
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        raise ArgumentError(
            f"{given('loss_fn', loss_fn)}: {_AS_CALLED}, so pass a function, such as "
            f"lambda model, batch: {loss_fn.__name__}()(model(batch[0]), batch[1])"
        )


def iterated(batches: Any) -> Iterable[Any]:
    """Batches that can be iterated over.

    Raises:
        ArgumentError: If they cannot be, or are one batch, which would be taken apart.
    """
    is_one = isinstance(batches, (Tensor, np.ndarray, dict, str, bytes))
    try:
        found = None if is_one else iter(batches)
    except TypeError:
        found = None
    if found is None:
        raise ArgumentError(
            f"{given('batches', batches)}: pass a list of batches, such as [images], or a "
            "DataLoader"
        )
    return found


def loss_of(loss_fn: LossFunction, model: nn.Module, batch: Any) -> Any:
    """What a loss function returns for a batch: one real number, a tensor or another.

    Raises:
        PatchError: If it fails.
        ArgumentError: If it returns something else.
    """
    try:
        loss = loss_fn(model, batch)
    except CoordConvPatchError:
        raise
    except Exception as error:
        raise PatchError(
            f"loss_fn failed on one of the batches ({describe_inputs(batch)}): "
            f"{first_line(error)}; {_AS_CALLED}"
        ) from error
    if not isinstance(loss, Tensor):
        return loss
    if loss.numel() != 1:
        raise ArgumentError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}: return a tensor of one "
            "number, such as its mean()"
        )
    if loss.is_meta:
        raise ArgumentError("loss_fn returned a tensor on the meta device, which has no value")
    if loss.is_complex():
        raise ArgumentError(
            f"loss_fn returned a tensor of {loss.dtype}: return a real number, such as its abs()"
        )
    return loss


def finite_loss(loss_fn: LossFunction, model: nn.Module, batch: Any) -> float:
    """The same as a float.

    Raises:
        PatchError: If it fails, or returns NaN or infinity.
        ArgumentError: If it returns something that is not one number.
    """
    loss = loss_of(loss_fn, model, batch)
    try:
        number = float(loss)
    except (TypeError, ValueError):
        raise ArgumentError(
            f"{given('the return value of loss_fn', loss)}: return one number"
        ) from None
    if not math.isfinite(number):
        cause = "which holds such values itself" if not_finite_in([batch]) else "check the model"
        raise PatchError(
            f"loss_fn returned {number} for one of the batches ({describe_inputs(batch)}): {cause}"
        )
    return number


def not_finite_in(batches: Sequence[Any]) -> bool:
    """Whether some tensor in the batches holds NaN or infinity."""
    return any(
        not bool(torch.isfinite(tensor).all())
        for tensor in tensors_in(list(batches))
        if tensor.is_floating_point() and not tensor.is_meta
    )
