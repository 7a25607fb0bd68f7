"""What the convolutions of a model compute on, to see where two runs part ways."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coordconv_patch.graphs.functional import CONV_SIGNATURES

__all__ = ["InputChecksums", "first_with_other_input"]


class InputChecksums(TorchFunctionMode):
    """While entered, notes the inputs of all convolution functions but the coordinates' own.

    Attributes:
        seen: The convolutions in order, each with a checksum of its input.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in model.named_parameters()}
        self.seen: list[tuple[str, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONV_SIGNATURES:
            given = dict(zip(CONV_SIGNATURES[func], args, strict=False)) | kwargs
            name = self.names.get(id(given["weight"]))
            if name is None and not isinstance(given["weight"], nn.Parameter):
                name = func.__name__  # a weight that the code computes
            if name is not None and not name.endswith("coord_weight"):
                self.seen.append((name.removesuffix(".weight"), _checksum(given["input"])))
        return func(*args, **kwargs)


def _checksum(tensor: Tensor) -> int:
    values = tensor.detach().contiguous().cpu().view(-1)
    return zlib.crc32(values.view(torch.uint8).numpy().tobytes()) if values.numel() else 0


def first_with_other_input(
    plain: Sequence[tuple[str, int]], patched: Sequence[tuple[str, int]]
) -> str:
    """The first convolution whose input is another one; empty if there is none."""
    for before, after in zip(plain, patched, strict=False):
        if before != after:
            return after[0]
    longer = plain if len(plain) > len(patched) else patched
    return longer[min(len(plain), len(patched))][0] if len(plain) != len(patched) else ""
