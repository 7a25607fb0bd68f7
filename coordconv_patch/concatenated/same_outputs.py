"""Whether an imported model gives the outputs that it gave before, but for rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.patching.compared_run import ComparedRun
from coordconv_patch.patching.output_values import MISSING, difference_of

__all__ = ["OutputsBefore"]

_ULPS = 100
"""Differences that are allowed, in roundings of the largest output: sums in another order."""

_ULPS_TRAINING = 10_000
"""In training mode batch norm divides by the deviation of a small batch."""


_SMALLEST = 1e-6
"""Of outputs that are all smaller the differences are taken relative to this."""


class OutputsBefore:
    """The outputs of a model before it was rewritten.

    Args:
        model: The model.
        inputs: Several example inputs; the first one is tried in training mode too.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        modes = [(each, False) for each in inputs] + [(each, True) for each in inputs[:1]]
        self._runs = [
            (each, training, ComparedRun.of(model, each, training=training))
            for each, training in modes
        ]

    def compare(self, model: nn.Module) -> float | None:
        """The largest difference in evaluation mode, relative to the largest output.

        Returns:
            ``None`` if there are no inputs.

        Raises:
            PatchError: If the outputs differ by more than rounding.
        """
        worst = None
        for inputs, training, before in self._runs:
            if before.outputs is None:
                continue
            after = ComparedRun.of(model, inputs, training=training)
            if after.outputs is None:
                raise PatchError(f"the imported model fails: {after.error}")
            for place in dict.fromkeys((*before.outputs, *after.outputs)):
                value = before.outputs.get(place, MISSING)
                got = after.outputs.get(place, MISSING)
                difference = _difference(value, got, _ULPS_TRAINING if training else _ULPS)
                if difference is None:
                    mode = "training" if training else "evaluation"
                    raise PatchError(
                        f"in {mode} mode the imported model's output{place} differs: "
                        f"{difference_of(value, got)}. It may read coordinates elsewhere, or "
                        "turn rounding into other decisions (check=False accepts that)"
                    )
                worst = worst if training else max(worst or 0.0, difference)
        return worst


def _difference(before: Any, after: Any, ulps: int) -> float | None:
    """The largest difference relative to the largest value; ``None`` if it is not rounding."""
    if not difference_of(before, after):
        return 0.0
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return None
    if (before.shape, before.dtype) != (after.shape, after.dtype) or not before.is_floating_point():
        return None
    largest = float(before.double().abs().nan_to_num().max())
    difference = (before.double() - after.double()).abs()
    if bool(difference.isnan().any()):
        return None
    relative = float(difference.max()) / max(largest, _SMALLEST)
    return relative if relative <= ulps * torch.finfo(before.dtype).eps else None
