"""How often autograd was told that a tensor's values changed, inference tensors included."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["version_of", "versions_of"]

_NONE = -1
"""The version of a tensor that counts none."""


def version_of(tensor: Tensor) -> int:
    """A tensor's version counter.

    Tensors made in ``torch.inference_mode()`` have none: they answer the same number always, as
    if every change were one that autograd is not told of.
    """
    try:  # to ask whether it is one would be a function that modes see
        return tensor._version
    except RuntimeError:
        return _NONE


def versions_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """The :func:`version_of` each tensor; of ``None`` too, so that a tensor that goes shows."""
    try:  # before every forward: asking each tensor first would take twice as long
        return [_NONE if tensor is None else tensor._version for tensor in tensors]
    except RuntimeError:
        return [_NONE if tensor is None else version_of(tensor) for tensor in tensors]
