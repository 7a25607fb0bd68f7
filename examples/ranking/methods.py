"""Methods that train, beside the ranking: at one part at a time, or at all and then one kept.

The ranking itself (coordconv_patch/ranking) trains at one part at a time, too, but for so many
steps only at the best of them, and at the rate of the fine-tuning that it is to foretell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.ranking.one_by_one import gains_at, losses_with
from coordconv_patch.ranking.parts import Part
from coordconv_patch.ranking.probe import Loss, Probe


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
        return losses_with(probe, (), seeds)


class OneByOne(_ByPlain):
    """Train with coordinates at one part alone, beside an equal run without any."""

    def runs(self, parts: int, seeds: int) -> int:
        return (parts + 2) * seeds

    measurements = runs

    def gains(self, probe: Probe, plain: Tensor, parts: Sequence[Part]) -> Measured:
        return Measured(gains_at(probe, plain, parts))


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
            without = measured_with(probe, (), seed)
            for part, gains in zip(parts, kept, strict=True):
                gains.append(without - measured_with(probe, part.sites, seed))
        return Measured([torch.stack(gains) for gains in kept], torch.stack(together))


@torch.no_grad()
def measured_with(probe: Probe, sites: Iterable[str], seed: int) -> Tensor:
    """Held-out losses with the coordinate weights of all other sites at zero while measured."""
    kept = set(sites)
    others = [w for name, ws in probe.coords.items() if name not in kept for w in ws]
    values = [weight.detach().clone() for weight in others]
    for weight in others:
        weight.zero_()
    measured = probe.measured(seed)
    for weight, value in zip(others, values, strict=True):
        weight.copy_(value)
    return measured


METHODS: dict[str, Method] = {"one by one": OneByOne(), "together": Together()}
"""Methods by name."""


_SHARE = 0.03


def scaled_rates(
    patched: nn.Module, layers: Mapping[str, CoordLayer], loss: Loss, batch: Any
) -> dict[str, float]:
    """Learning rates of coordinate weights by site, each by the scale of its convolution's output.

    Adam moves each weight by about its learning rate, so with coordinates from -1 to 1 a step
    moves the output by at most the rate times the taps of the kernel. The rate lets that be 3 % of
    the output's standard deviation; of the input's, where a function and no module convolves.
    """
    scales: dict[str, float] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen = inputs[0] if isinstance(layer, CoordBranch) else output
        scales.setdefault(name, float(seen.float().std()))

    handles = [
        layer.register_forward_hook(lambda *given, name=name: note(name, *given))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        loss(patched, batch)
    for handle in handles:
        handle.remove()
    return {
        name: _SHARE * (scale or 1.0) / math.prod(layers[name].coord_geometry.kernel_size)
        for name, scale in scales.items()
    }
