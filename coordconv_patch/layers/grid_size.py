"""The sizes that a coordinate grid may be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from coordconv_patch.channels.convention_fields import is_whole
from coordconv_patch.errors import CoordinatesError, excerpt

__all__ = ["plain_sizes"]


def plain_sizes(size: Sequence[object]) -> tuple[int, ...] | None:
    """Sizes of numpy's or other integers as Python's; ``None`` for symbolic ones."""
    if all(is_whole(length) for length in size):
        return tuple(int(cast(int, length)) for length in size)
    for length in size:
        if not (isinstance(length, (torch.SymInt, Tensor)) or is_whole(length)):
            raise CoordinatesError(f"size={excerpt(size)}: write whole numbers, such as (224, 224)")
    return None
