"""A ranking under way: what it will cost, its runs, and the table that they give."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.scrambled import scrambled
from coordconv_patch.patching.patch import patch
from coordconv_patch.ranking.batches import Batches
from coordconv_patch.ranking.gains import Gain, gain_of
from coordconv_patch.ranking.one_by_one import gains_at, losses_with
from coordconv_patch.ranking.parts import Part
from coordconv_patch.ranking.probe import Loss, Probe, Recipe
from coordconv_patch.ranking.ranking import RankedPart, Ranking
from coordconv_patch.ranking.rounds import Rounds

__all__ = ["Trial"]

_LOG = logging.getLogger(__name__)


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
        rounds: How long they are, and how many of each.
        example_inputs: With which the model is patched.
    """

    model: nn.Module
    patched: nn.Module
    parts: Sequence[Part]
    coords: Coordinates
    loss: Loss
    batches: Batches
    recipe: Recipe
    rounds: Rounds
    example_inputs: Any

    def ranking(self, unreached: Sequence[str]) -> Ranking:
        """Make the runs, behind a progress bar, and rank the parts."""
        rounds, parts = self.rounds, self.parts
        cost = rounds.cost(len(parts), len(self.batches.held_out))
        name = f"{len(parts)} {'rows' if len(parts) > 1 else 'row'}"
        _LOG.info("ranking %s will cost as much as %.0f plain training steps", name, cost)
        steps = rounds.training_steps(len(parts))
        with tqdm(total=steps, desc=f"ranking {name}", unit=" steps", disable=None) as bar:
            probe = self._probe(self.patched, parts, bar)
            before = float(probe.measured(0).mean())
            began = self._rows(probe.lasting(rounds.first), parts, 1) if rounds.first else []
            tried = [row.part for row in began[: rounds.finalists]] or parts
            plain = losses_with(probe, (), rounds.seeds)
            rows = self._rows(probe, tried, rounds.seeds, plain)
            best = next((row for row in rows if row.worthwhile), None)
            control = None if best is None else self._scrambled(best.part, plain, bar)
        return Ranking(
            rows=(*rows, *began[rounds.finalists :]),
            plain=(before, float(plain.mean())),
            scrambled=control,
            coords=self.coords,
            steps=rounds.steps,
            seeds=rounds.seeds,
            cost=cost,
            unreached=tuple(unreached),
        )

    def _rows(
        self, probe: Probe, parts: Sequence[Part], seeds: int, plain: Tensor | None = None
    ) -> list[RankedPart]:
        """Rows of one round, the largest gain first; those of the last round may be worthwhile."""
        base = losses_with(probe, (), seeds) if plain is None else plain
        gains = [gain_of(one, len(self.parts)) for one in gains_at(probe, base, parts)]
        rows = [
            RankedPart(part, gain, self.parts.index(part), probe.recipe.steps, plain is not None)
            for part, gain in zip(parts, gains, strict=True)
        ]
        return sorted(rows, key=lambda row: row.gain.value, reverse=True)

    def _probe(self, patched: nn.Module, parts: Sequence[Part], bar: Any) -> Probe:
        sites = [site for part in parts for site in part.sites]
        return Probe(patched, sites, self.loss, *self.batches, self.recipe, bar.update)

    def _scrambled(self, part: Part, plain: Tensor, bar: Any) -> Gain:
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
        return gain_of(gains_at(probe, plain, [part])[0])
