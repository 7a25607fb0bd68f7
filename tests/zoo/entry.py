"""What one entry of the catalogue is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Entry", "image", "names_in"]


@dataclass(frozen=True)
class Entry:
    """A model with random weights, and inputs for it; nothing is downloaded.

    Attributes:
        name: ``library/model``, unique.
        build: Makes the model. Libraries are imported here, not before.
        inputs: Example inputs, as ``ccp.patch`` takes them; the same values every time.
        train_inputs: Inputs for the training mode (targets, say); ``None``: ``inputs``.
        refused: Why some convolutions of the model are refused, a pattern of the
            message; empty: none may be.
        kills_exporter: Why the process ends when torch exports the plain model, so that no
            export is tried; empty where it does not.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    train_inputs: Callable[[], Any] | None = None
    refused: str = ""
    kills_exporter: str = ""

    @property
    def library(self) -> str:
        """The part of the name before the first slash."""
        return self.name.partition("/")[0]

    def example(self, *, training: bool) -> Any:
        """Fresh inputs: models may write into them."""
        if training and self.train_inputs is not None:
            return self.train_inputs()
        return self.inputs()


def image(*shape: int, seed: int = 0) -> Callable[[], Tensor]:
    """A maker of one seeded normal tensor."""

    def make() -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return make


def names_in(text: str) -> list[str]:
    """The words of a text, for long lists of names."""
    return text.split()
