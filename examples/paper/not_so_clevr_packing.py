"""Pictures and positions as short text, for the record: a line each instead of thousands."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_STEPS_A_PIXEL = 500
"""Positions are kept to 1/500 pixel; 16 bits then reach 65 pixels to either side."""


def pack_levels(levels: Tensor) -> str:
    """Values from 0 to 1, of any shape, as hexadecimal text with one byte a value."""
    return bytes((levels * 255).round().byte().flatten().tolist()).hex()


def unpack_levels(text: str, *shape: int) -> Tensor:
    """Inverse of :func:`pack_levels`, to a 255th."""
    return torch.tensor(list(bytes.fromhex(text))).view(shape) / 255


def pack_positions(positions: Tensor) -> str:
    """Positions (x, y) in pixels, shape ``(N, 2)``, as hexadecimal text; cut off at ±65."""
    steps = (positions * _STEPS_A_PIXEL).round().clamp(-32768, 32767)
    return steps.numpy().astype(">i2").tobytes().hex()


def unpack_positions(text: str) -> Tensor:
    """Inverse of :func:`pack_positions`, to 1/1000 pixel."""
    steps = np.frombuffer(bytes.fromhex(text), dtype=">i2").astype("f4")
    return torch.from_numpy(steps).view(-1, 2) / _STEPS_A_PIXEL
