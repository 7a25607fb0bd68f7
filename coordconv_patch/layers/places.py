"""Which part of a picture each sample of a batch is, as the coordinate layers of a model see it.

A *place* is an affine map, per sample, from positions in the network's input to positions in
the whole picture; see :func:`coordconv_patch.places`. The layers of a model share one
:class:`Places`, and ask it at each forward.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.recomputation import checkpoints_around, is_in_backward

__all__ = ["Places", "entered", "shared_places"]


class _PerThread(threading.local):
    """What one thread has entered. A list, for torch.compile guards items and not attributes."""

    def __init__(self) -> None:
        self.theta: list[Tensor | None] = [None]


class Places:
    """The places of the samples that a model's layers see now.

    Copies, and what pickle makes, keep the lasting places and nothing of the entered ones.

    Attributes:
        lasting: For every thread, shape (N, d, d + 1); ``None``: none.
    """

    def __init__(self, lasting: Tensor | None = None) -> None:
        self.lasting = lasting
        self._entered = _PerThread()
        self._was_used = False

    def now(self) -> Tensor | None:
        """The places that hold in this thread, shape (N, d, d + 1); ``None``: whole pictures.

        Gradient checkpointing runs layers again in the backward pass, when other places may
        hold, or none: they then see those of the first run.

        Raises:
            PatchError: If code that torch does not know runs layers again, after their places
                were left.
        """
        theta = self._entered.theta[0]
        if theta is None:
            theta = self.lasting
        if torch.compiler.is_compiling():
            return theta
        if is_in_backward():
            return self._recomputed(theta)
        if theta is not None or self._was_used:
            self._was_used = True
            for checkpoint in checkpoints_around():
                checkpoint.__dict__[_remembered(self)] = theta
        return theta

    def _recomputed(self, theta: Tensor | None) -> Tensor | None:
        name = _remembered(self)
        checkpoints = list(checkpoints_around())
        for at, checkpoint in enumerate(checkpoints):
            if name in checkpoint.__dict__:
                for inner in checkpoints[:at]:
                    inner.__dict__[name] = checkpoint.__dict__[name]
                return checkpoint.__dict__[name]
        if checkpoints:  # nobody had used places when they ran first
            return None
        if theta is None and self._was_used:
            raise PatchError(
                "a model with places is run again in a backward pass, after the places were "
                "left, by code that is not torch.utils.checkpoint: call backward() inside of "
                "`with places(...)`, or use torch.utils.checkpoint"
            )
        return theta

    def __deepcopy__(self, memo: dict[int, Any]) -> Places:
        return Places(copy.deepcopy(self.lasting, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Places, (self.lasting,)


_sharing = threading.Lock()


def shared_places(layers: Iterable[nn.Module]) -> list[Places]:
    """What the layers of a model ask, each once; layers that have nothing to ask get one."""
    with _sharing:
        shared: dict[int, Places] = {}
        new = Places()
        for layer in layers:
            # Not an attribute that tells how the layer pads, which setattr would look into.
            places = layer.__dict__.setdefault("_places", new)
            shared[id(places)] = places
        return list(shared.values())


@contextmanager
def entered(places: Iterable[Places], theta: Tensor | None) -> Iterator[None]:
    """While entered, these places hold in this thread; those from before hold again afterwards."""
    boxes = [each._entered.theta for each in places]
    before = [box[0] for box in boxes]
    for box in boxes:
        box[0] = theta
    try:
        yield
    finally:
        for box, theta_before in zip(boxes, before, strict=True):
            box[0] = theta_before


def _remembered(places: Places) -> str:
    """The name under which a checkpoint remembers the places of its first run."""
    return f"_coordconv_places_{id(places)}"
