"""What a coordinate grid may be asked for: sizes, and what else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from coordconv_patch.channels.convention_fields import is_whole
from coordconv_patch.errors import CoordinatesError, excerpt, first_line
from coordconv_patch.layers.capture import is_capturing

__all__ = ["check_grid_arguments", "plain_sizes"]


def check_grid_arguments(size: object, device: object, dtype: object) -> None:
    """Check what somebody asks a grid for; not while a graph is captured.

    Raises:
        CoordinatesError: If the size is not a sequence, the device not one of torch's, or the dtype
            not one of floats.
    """
    if is_capturing():
        return
    is_sequence = isinstance(size, Iterable) and not (isinstance(size, Tensor) and size.dim() == 0)
    if not is_sequence:
        raise CoordinatesError(
            f"size={excerpt(size)}: write one length a dimension, such as (9, 9)"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CoordinatesError(
            f"dtype={excerpt(dtype)}: coordinates are fractions, write a float dtype, such as "
            "torch.float32"
        )
    if device is not None:
        try:
            torch.device(cast("str", device))
        except (RuntimeError, TypeError) as error:
            raise CoordinatesError(
                f"device={excerpt(device)}: {first_line(error)}: write a device, such as 'cpu'"
            ) from error


def plain_sizes(size: Sequence[object]) -> tuple[int, ...] | None:
    """Sizes of numpy's or other integers as Python's; ``None`` for symbolic ones."""
    if all(is_whole(length) for length in size):
        return tuple(int(cast(int, length)) for length in size)
    for length in size:
        if not (isinstance(length, (torch.SymInt, Tensor)) or is_whole(length)):
            raise CoordinatesError(f"size={excerpt(size)}: write whole numbers, such as (224, 224)")
    return None
