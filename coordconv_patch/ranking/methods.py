"""Two ways to measure what coordinates gain: one site or stage at a time, or all and one kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coordconv_patch.ranking.parts import Part
from coordconv_patch.ranking.probe import Probe

__all__ = ["METHODS", "Measured", "Method", "OneByOne", "Together"]


@dataclass(frozen=True)
class Measured:
    """What training with coordinates took off the held-out losses, for S seeds and B batches.

    Attributes:
        parts: For each part, losses without its coordinates less those with them, ``(S, B)``.
        together: The same of all parts at once; ``None`` where that was not measured.
    """

    parts: list[Tensor]
    together: Tensor | None = None


class Method(Protocol):
    """How gains are measured."""

    def runs(self, parts: int, seeds: int) -> int:
        """Training runs that it takes for so many parts, the scrambled control's among them."""

    def measurements(self, parts: int, seeds: int) -> int:
        """Passes over the held-out batches that it takes, likewise."""

    def plain(self, probe: Probe, seeds: int) -> Tensor:
        """Held-out losses after training without coordinates, ``(S, B)``."""

    def gains(self, probe: Probe, plain: Tensor, parts: Sequence[Part]) -> Measured:
        """What coordinates at each part gain."""


class _ByPlain:
    """What both compare with: runs without coordinates."""

    def plain(self, probe: Probe, seeds: int) -> Tensor:
        return torch.stack([probe.losses((), seed) for seed in range(seeds)])


class OneByOne(_ByPlain):
    """Train with coordinates at one part alone, beside an equal run without any."""

    def runs(self, parts: int, seeds: int) -> int:
        return (parts + 2) * seeds

    measurements = runs

    def gains(self, probe: Probe, plain: Tensor, parts: Sequence[Part]) -> Measured:
        seeds = range(len(plain))
        return Measured(
            [
                plain - torch.stack([probe.losses(part.sites, seed) for seed in seeds])
                for part in parts
            ]
        )


class Together(_ByPlain):
    """Train with coordinates at every part; then keep those of one and set all others to zero."""

    def runs(self, parts: int, seeds: int) -> int:
        return 3 * seeds

    def measurements(self, parts: int, seeds: int) -> int:
        return (parts + 6) * seeds

    def gains(self, probe: Probe, plain: Tensor, parts: Sequence[Part]) -> Measured:
        kept: list[list[Tensor]] = [[] for _ in parts]
        together = []
        for seed, losses in enumerate(plain):
            probe.train(probe.coords, seed)
            together.append(losses - probe.measured(seed))
            without = probe.measured_with((), seed)
            for part, gains in zip(parts, kept, strict=True):
                gains.append(without - probe.measured_with(part.sites, seed))
        return Measured([torch.stack(gains) for gains in kept], torch.stack(together))


METHODS: dict[str, Method] = {"one by one": OneByOne(), "together": Together()}
"""Methods by the name that ``rank(method=...)`` takes."""
