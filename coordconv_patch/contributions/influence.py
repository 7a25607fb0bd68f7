"""Measure what each site's coordinates contribute to a trained model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from coordconv_patch.arguments import check_example_inputs
from coordconv_patch.contributions.moments import Moments
from coordconv_patch.contributions.report import Influence, SiteInfluence
from coordconv_patch.contributions.taps import Taps
from coordconv_patch.errors import ArgumentError, PatchError
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.running.inputs import run_model
from coordconv_patch.running.losses import LossFunction, check_loss_fn, finite_loss, iterated
from coordconv_patch.running.uncompiled import uncompiled
from coordconv_patch.running.untouched import copied, evaluation
from coordconv_patch.running.wrappers import unwrapped

__all__ = ["influence"]


def influence(
    model: nn.Module, batches: Iterable[Any], loss_fn: LossFunction | None = None
) -> Influence:
    """What the coordinates of each patched site contribute to the model as it is now.

    Two figures for each site: the coordinates' share of the variance of its output, and, with a
    loss function, the loss when the coordinates of this site alone are switched off. Held-out
    batches tell what a site is good for; a site that is switched off was not trained to be missing,
    so a rise says what the model relies on, not what it could do without.

    All is measured on a copy in evaluation mode and without gradients: of the model given, no
    parameter, buffer, flag or hook changes, nor the random state. There is one forward pass for
    each batch, and with a loss function one more for each site that was called and whose coordinate
    weights are not zero, and one with all of them off.

    Args:
        model: A patched model.
        batches: Batches, all kept in memory for the time of the call. With ``loss_fn`` anything;
            without it what the model is called with: tensors, or tuples of arguments where a dict
            at the end is keyword arguments.
        loss_fn: ``loss_fn(model, batch)`` gives one number, a tensor or a float; the model that it
            gets is the copy. ``None``: only the shares are measured.

    Raises:
        PatchError: If the model is not patched, or cannot be copied, or fails on a batch; or if
            ``loss_fn`` fails; or if the loss or what a site gives is not finite.
        ArgumentError: If there is no batch, or the loss is not one number.

    Example:
        >>> import torch
        >>> from coordconv_patch import patch
        >>> model = patch(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
        >>> influence(model, [torch.rand(2, 3, 16, 16)])["0"].share
        0.0
    """
    kept = _batches(batches, loss_fn)
    require_coord_layers(model)
    twin = copied(unwrapped(model), advice="influence looks at a copy of the model")
    look = _Look(twin, loss_fn)
    losses = [look.with_all(batch) for batch in kept]
    if loss_fn is None:
        return Influence(tuple(look.site(name) for name in look.in_order), len(kept))
    without_any = look.without(frozenset(look.taps.sites), kept)
    sites = []
    for name in tqdm(look.in_order, desc="sites off", delay=1.0, disable=None, leave=False):
        # Where nothing was added, nothing can be missing.
        without = look.without(frozenset([name]), kept) if look.adds(name) else losses
        sites.append(look.site(name, losses, without))
    mean = statistics.fmean
    return Influence(tuple(sites), len(kept), mean(losses), mean(without_any))


class _Look:
    """A copy of a model, run with and without the coordinates of its sites."""

    def __init__(self, twin: nn.Module, loss_fn: LossFunction | None) -> None:
        self.twin, self.loss_fn, self.taps = twin, loss_fn, Taps(twin)
        self.of_input: dict[str, Moments] = {}
        self.of_coords: dict[str, Moments] = {}
        layers = require_coord_layers(twin)
        self.ndims = {name: layer.coord_geometry.ndim for name, layer in layers.items()}
        self.nonzero: set[str] = set()

    @property
    def in_order(self) -> tuple[str, ...]:
        """The sites in order of execution; those that were not called, last."""
        return tuple(dict.fromkeys((*self.of_input, *self.taps.sites)))

    def adds(self, site: str) -> bool:
        """Whether the coordinates of a site have added anything but zeros."""
        return site in self.nonzero

    def with_all(self, batch: Any) -> float:
        """The loss of a batch, 0 without a loss function; what the sites do is summed up."""
        with evaluation(self.twin), self.taps.open(seen=self._see):
            return self._loss(batch)

    def without(self, sites: frozenset[str], batches: list[Any]) -> list[float]:
        """The losses of the batches with some sites' coordinates switched off."""
        losses = []
        for batch in batches:
            with evaluation(self.twin), self.taps.open(off=sites):
                losses.append(self._loss(batch))
        return losses

    def site(
        self, name: str, losses: list[float] | None = None, without: list[float] | None = None
    ) -> SiteInfluence:
        """The figures of a site, from the losses of each batch with and without it."""
        of_input, of_coords = self.of_input.get(name), self.of_coords.get(name)
        variances = (
            None if of_input is None else of_input.variance,
            None if of_coords is None else of_coords.variance,
        )
        if not all(math.isfinite(variance or 0.0) for variance in variances):
            raise PatchError(
                f"{name or 'the convolution'} gives values that are not finite on these batches, "
                "so there is nothing to compare: check the batches and the model"
            )
        if losses is None or without is None or of_input is None:
            return SiteInfluence(name, *variances)
        rises = [off - on for on, off in zip(losses, without, strict=True)]
        error = statistics.stdev(rises) / len(rises) ** 0.5 if len(rises) > 1 else None
        mean = statistics.fmean
        return SiteInfluence(name, *variances, mean(without), mean(rises), error)

    def _loss(self, batch: Any) -> float:
        if self.loss_fn is None:
            run_model(self.twin, batch)
            return 0.0
        with uncompiled(self.twin):
            return finite_loss(self.loss_fn, self.twin, batch)

    def _see(self, site: str, output: Tensor, branch: Tensor) -> None:
        channel_dim = -1 - self.ndims[site]
        self.of_input.setdefault(site, Moments()).add(output, channel_dim)
        samples = output.numel() / branch.numel()  # a map may be one for all samples
        self.of_coords.setdefault(site, Moments()).add(branch, channel_dim, samples)
        if branch.any():
            self.nonzero.add(site)


def _batches(batches: Any, loss_fn: Any) -> list[Any]:
    """The batches as a list.

    Raises:
        ArgumentError: If there is none, or it is one batch and not several.
    """
    if loss_fn is not None:
        check_loss_fn(loss_fn)
    kept = list(iterated(batches))
    if not kept:
        raise ArgumentError("batches: there is none, pass at least one")
    if loss_fn is None:
        for batch in kept:
            check_example_inputs(batch, optional=False)
    return kept
