"""Training runs on a copy: with coordinates at some sites, or at none.

All runs begin at the same weights and see the same batches in the same order, and random numbers
are drawn alike, so two runs differ in their coordinates alone. One copy of the model carries a
coordinate weight at every site that is ranked; those that a run is not about stay at zero, where
outputs equal the plain model's to the last bit.

Batch norms keep their statistics, and normalize by them. A dozen steps cannot move running averages
far, and the statistics of the few pictures of one batch would blur what is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from coordconv_patch.errors import ArgumentError, PatchError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.running.losses import loss_of, not_finite_in
from coordconv_patch.running.random_states import seed_all
from coordconv_patch.training import coord_parameters_of

__all__ = ["Loss", "Probe", "Recipe"]

Loss = Callable[[nn.Module, Any], Tensor]
"""A model and a batch to a scalar."""


@dataclass(frozen=True)
class Recipe:
    """How a run trains: Adam, its learning rates falling to zero in a straight line.

    Attributes:
        steps: Optimizer steps.
        lr: Learning rate of the model's own weights, those that require a gradient.
        coord_lr: Learning rates of the coordinate weights, by site; of n sites that are trained
            at once each has its rate over the square root of n.
    """

    steps: int
    lr: float
    coord_lr: Mapping[str, float]


class Probe:
    """Runs on one patched copy of a model.

    Args:
        patched: The copy, all of whose new coordinate weights are zero. It is changed.
        sites: Names of the sites that are ranked.
        loss: Of a model on a batch.
        training: Batches to train on.
        held_out: Batches to measure on.
        recipe: How to train.
        on_step: Called after every training step.
    """

    def __init__(
        self,
        patched: nn.Module,
        sites: Iterable[str],
        loss: Loss,
        training: Sequence[Any],
        held_out: Sequence[Any],
        recipe: Recipe,
        on_step: Callable[[], Any] = lambda: None,
    ) -> None:
        self.model, self.loss, self.on_step = patched, loss, on_step
        self.training, self.held_out, self.recipe = training, held_out, recipe
        layers = coord_layers(patched)
        self.has_trained = False
        self.coords = {name: coord_parameters_of(layers[name]) for name in sites}
        ids = {id(weight) for weights in self.coords.values() for weight in weights}
        parameters = list(patched.parameters())
        self.own = [p for p in parameters if id(p) not in ids and p.requires_grad]
        self.start = [
            (tensor, tensor.detach().clone()) for tensor in (*parameters, *patched.buffers())
        ]
        for module in patched.modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                module.eval()

    def lasting(self, steps: int) -> Probe:
        """The same one with runs of another length."""
        other = copy.copy(self)
        other.recipe = replace(self.recipe, steps=steps)
        return other

    def losses(self, sites: Iterable[str], seed: int) -> Tensor:
        """Held-out losses, one a batch, after a run with coordinates at these sites; float64.

        Raises:
            PatchError: If the loss is not a finite number.
            ArgumentError: If it has no gradient.
        """
        self.train(sites, seed)
        return self.measured(seed)

    def train(self, sites: Iterable[str], seed: int) -> None:
        """Make a run with coordinates at these sites, from the start.

        Raises:
            ArgumentError: If the loss has no gradient.
        """
        chosen = list(sites)
        self._begin(chosen)
        rates = [(self.own, self.recipe.lr)]
        share = max(1, len(chosen)) ** -0.5
        rates += [(self.coords[name], share * self.recipe.coord_lr[name]) for name in chosen]
        groups = [{"params": params, "lr": rate} for params, rate in rates if params]
        if not groups:  # nothing of the plain model is trained: it stays as it is
            return
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, 1 / self.recipe.steps, total_iters=max(1, self.recipe.steps - 1)
        )
        self.has_trained = True
        for step, index in enumerate(self._order(seed)):
            seed_all(1_000_003 * seed + step)
            loss = loss_of(self.loss, self.model, self.training[index])
            _check_has_gradient(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            self.on_step()

    def _begin(self, chosen: Sequence[str]) -> None:
        """Go back to the start, with coordinate weights to be trained at the chosen sites alone."""
        with torch.no_grad():
            for tensor, value in self.start:
                tensor.copy_(value)
        for name, weights in self.coords.items():
            for weight in weights:
                weight.requires_grad_(name in chosen)
        self.model.zero_grad()

    def _order(self, seed: int) -> list[int]:
        """Which training batch each step takes: all of them, shuffled, again and again."""
        generator = torch.Generator().manual_seed(seed)
        count = len(self.training)
        rounds = -(-self.recipe.steps // count)
        orders = [torch.randperm(count, generator=generator) for _ in range(rounds)]
        return [int(index) for index in torch.cat(orders)[: self.recipe.steps]]

    @torch.no_grad()
    def measured(self, seed: int) -> Tensor:
        """Losses on the held-out batches now, shape ``(B,)``, float64."""
        losses = []
        for index, batch in enumerate(self.held_out):
            seed_all(1_000_003 * seed + 500_000 + index)
            losses.append(float(loss_of(self.loss, self.model, batch)))
        measured = torch.tensor(losses, dtype=torch.float64)
        if not measured.isfinite().all():
            raise PatchError(f"the held-out loss {self._why_not_finite(float(measured.sum()))}")
        return measured

    def _why_not_finite(self, loss: float) -> str:
        blame_batches = not_finite_in(self.held_out)
        if self.has_trained:  # which began at a finite loss, whatever is held out: say masks of inf
            blame_batches = not blame_batches and not_finite_in(self.training)
        if blame_batches:
            return f"is {loss}: some of the batches hold NaN or infinity, leave them out"
        if not self.has_trained:
            return f"is {loss} before any training: check the model and loss_fn"
        return (
            f"became {loss} after {self.recipe.steps} steps with lr={self.recipe.lr:g}: write a "
            "smaller one"
        )


def _check_has_gradient(loss: Any) -> None:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ArgumentError(
            "loss_fn returned a loss without a gradient, and the model is trained by it: return it "
            "as it was computed, without detach(), item() or torch.no_grad()"
        )
