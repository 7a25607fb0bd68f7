"""A ranking under way: what it will cost, its runs, and the table that they give."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.scrambled import scrambled
from coordconv_patch.patching.patch import patch
from coordconv_patch.ranking.batches import Batches
from coordconv_patch.ranking.gains import Gain, gains_of
from coordconv_patch.ranking.one_by_one import gains_at, losses_with, runs_of
from coordconv_patch.ranking.parts import Part
from coordconv_patch.ranking.probe import Loss, Probe, Recipe
from coordconv_patch.ranking.ranking import RankedPart, Ranking

__all__ = ["Trial", "steps_within"]

_FORWARD = 1 / 3
"""What a forward pass costs, in training steps."""
_MOST_STEPS = 100
_FEWEST_STEPS = 4
_LOG = logging.getLogger(__name__)


def steps_within(budget: float, parts: int, seeds: int, held_out: int) -> int:
    """How long runs may be if a whole ranking is to cost so many plain training steps."""
    steps = int(budget / runs_of(parts, seeds) - held_out * _FORWARD)
    return max(_FEWEST_STEPS, min(_MOST_STEPS, steps))


@dataclass(frozen=True)
class Trial:
    """What is tried out, and how.

    Attributes:
        model: The user's model, which is only copied.
        patched: A copy with coordinates at every site that is ranked.
        parts: The rows.
        coords: The convention.
        loss: Of a model on a batch.
        batches: To train and to measure on.
        recipe: How a run trains.
        seeds: Runs of each.
        example_inputs: With which the model is patched.
    """

    model: nn.Module
    patched: nn.Module
    parts: Sequence[Part]
    coords: Coordinates
    loss: Loss
    batches: Batches
    recipe: Recipe
    seeds: int
    example_inputs: Any

    @property
    def cost(self) -> float:
        """In training steps of the plain model."""
        run = self.recipe.steps + len(self.batches.held_out) * _FORWARD
        return runs_of(len(self.parts), self.seeds) * run

    def ranking(self, unreached: Sequence[str]) -> Ranking:
        """Make the runs, behind a progress bar, and rank the parts."""
        steps = runs_of(len(self.parts), self.seeds) * self.recipe.steps
        rows = f"{len(self.parts)} {'rows' if len(self.parts) > 1 else 'row'}"
        _LOG.info("ranking %s will cost as much as %.0f plain training steps", rows, self.cost)
        with tqdm(total=steps, desc=f"ranking {rows}", unit=" steps", disable=None) as bar:
            probe = self._probe(self.patched, self.parts, bar)
            before = float(probe.measured(0).mean())
            plain = losses_with(probe, (), self.seeds)
            gains = gains_of(gains_at(probe, plain, self.parts))
            rows_ = sorted(
                map(RankedPart, self.parts, gains, range(len(gains))),
                key=lambda row: row.gain.value,
                reverse=True,
            )
            best = next((row for row in rows_ if row.worthwhile), None)
            control = None if best is None else self._scrambled(best.part, plain, bar)
        return Ranking(
            rows=tuple(rows_),
            plain=(before, float(plain.mean())),
            scrambled=control,
            coords=self.coords,
            steps=self.recipe.steps,
            seeds=self.seeds,
            cost=self.cost,
            unreached=tuple(unreached),
        )

    def _probe(self, patched: nn.Module, parts: Sequence[Part], bar: Any) -> Probe:
        sites = [site for part in parts for site in part.sites]
        return Probe(patched, sites, self.loss, *self.batches, self.recipe, bar.update)

    def _scrambled(self, part: Part, plain: torch.Tensor, bar: Any) -> Gain:
        """What scrambled coordinates gain there."""
        convention = scrambled(self.coords)
        patched = patch(
            self.model,
            list(part.sites),
            coords=convention,
            example_inputs=self.example_inputs,
            check=False,
        )
        probe = self._probe(patched, [part], bar)
        return gains_of(gains_at(probe, plain, [part]))[0]
