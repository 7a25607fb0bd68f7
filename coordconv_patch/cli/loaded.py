"""A model that the command line has loaded, with example inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LoadedModel", "random_image"]


@dataclass(frozen=True)
class LoadedModel:
    """A model from the command line, in evaluation mode, and inputs that fit it.

    Attributes:
        model: The module; of an exported program, its GraphModule in the program's mode.
        example_inputs: Inputs to run it on, see :func:`coordconv_patch.plan`.
        trained: Whether it came with trained weights.
        dynamic_shapes: Of an exported program, its dynamic axes as ``torch.export.export``
            takes them; ``None`` if it has none.
        batch_is_fixed: Whether the model runs at one batch size only.
    """

    model: nn.Module
    example_inputs: Any
    trained: bool
    dynamic_shapes: dict[str, Any] | None = None
    batch_is_fixed: bool = False


def random_image(size: tuple[int, ...]) -> Tensor:
    """An example image, or several, of values from 0 to 1; the same at every call."""
    return torch.rand(size, generator=torch.Generator().manual_seed(0))
