"""How gains are measured: coordinates at one part alone, beside an equal run without any.

Gradients of the zero weights, read-outs of position, and training with coordinates everywhere and
then switching them off were tried as well; examples/ranking has them, and what each was worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from coordconv_patch.ranking.parts import Part
from coordconv_patch.ranking.probe import Probe

__all__ = ["gains_at", "losses_with"]


def losses_with(probe: Probe, sites: Iterable[str], seeds: int) -> Tensor:
    """Held-out losses after training with coordinates at some sites, or none: ``(S, B)``."""
    names = tuple(sites)
    return torch.stack([probe.losses(names, seed) for seed in range(seeds)])


def gains_at(probe: Probe, plain: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """For each part, losses without its coordinates less those with them, ``(S, B)``."""
    return [plain - losses_with(probe, part.sites, len(plain)) for part in parts]
