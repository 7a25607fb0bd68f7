"""Rank the sites of a model, or stages of them, by what coordinates there would gain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from coordconv_patch.arguments import check_number, given
from coordconv_patch.errors import ArgumentError, PatchError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.patching.patch import patch
from coordconv_patch.ranking.batches import split
from coordconv_patch.ranking.parts import By, parts_of, reached_sites
from coordconv_patch.ranking.probe import Loss, Recipe
from coordconv_patch.ranking.ranking import Ranking
from coordconv_patch.ranking.rounds import rounds_within
from coordconv_patch.ranking.trial import Trial
from coordconv_patch.running.inputs import check_has_values, check_is_module
from coordconv_patch.running.losses import check_loss_fn
from coordconv_patch.running.random_states import random_states_kept
from coordconv_patch.sites.select import Where

__all__ = ["rank"]

_BUDGET = 100
"""Plain training steps that a ranking may cost for each of its rows."""
_COORD_RATES = 10
"""Learning rates of the other weights, for those of coordinates, as the docs advise."""


def rank(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Loss,
    where: Where = "all",
    *,
    by: By | None = None,
    coords: Coordinates | str | None = None,
    example_inputs: Any = None,
    lr: float = 1e-3,
    coord_lr: float | None = None,
    steps: int | None = None,
    seeds: int = 2,
) -> Ranking:
    """Rank convolutions, or stages of them, by what coordinates there take off the loss.

    Each is tried out: a copy is trained with coordinates there alone, beside a copy that is trained
    alike without any; then the two are compared on batches that neither was trained on. All have
    twenty steps; the best two, or the best quarter of many, start anew and have as many as the
    budget allows. Train the plain model first; a ranking of an untrained one tells how it begins.

    Nothing of the model changes: not its weights, buffers, flags or hooks, nor the states of random
    generators. The copies are in the model's mode, but batch norms keep their statistics; and what
    does not require a gradient is not trained.

    Args:
        model: Any module that :func:`coordconv_patch.patch` takes; plain, or with coordinates
            elsewhere.
        batches: A list of batches or a DataLoader, of which the first 64 are used; 8 at least.
            Every fourth is held out, eight at most. They are kept in memory.
        loss_fn: Called as ``loss_fn(model, batch)`` with a copy of the model; gives a tensor of
            one number.
        where: Which convolutions, see :func:`coordconv_patch.patch`.
        by: Rank each ``"site"``, or each ``"stage"`` (``layer1``, ...); ``None``: stages where
            there are more than 16 sites.
        coords: The convention of the coordinate channels; ``None``: the paper's.
        example_inputs: See :func:`coordconv_patch.patch`.
        lr: Learning rate of Adam, for the model's own weights, as for fine-tuning.
        coord_lr: That of the coordinate weights, as for fine-tuning; ``None``: ten times ``lr``.
        steps: Training steps of each long run; ``None``: as many as make the whole ranking, its
            control and all measurements cost 100 training steps of the plain model for each row.
        seeds: Long runs of each, with the training batches in different orders; what is to be
            worthwhile has to gain in every one. 2 or more.

    Returns:
        The rows with their gains and intervals. ``ranking.worthwhile()`` and ``ranking.top(n)`` are
        names of sites, for ``patch(model, where=...)``.

    Raises:
        ArgumentError: If an argument makes no sense.
        SelectionError: As :func:`coordconv_patch.patch`.
        PatchError: Likewise; also if the loss fails, does not run the model that it is given, or is
            not finite; and of weights that cannot be trained, in float16 or on the meta device.

    Example:
        >>> ranking = ccp.rank(model, batches, loss_fn)                  # doctest: +SKIP
        >>> model = ccp.patch(model, where=ranking.worthwhile())         # doctest: +SKIP
    """
    check_is_module(model)
    check_has_values(model)
    _check_trainable(model)
    check_loss_fn(loss_fn)
    _check(by, lr, steps, seeds)
    if coord_lr is not None:
        check_number("coord_lr", coord_lr)
    taken, convention = split(batches), Coordinates.of(coords)
    # Wherever it is called: the runs need gradients.
    with random_states_kept(), torch.inference_mode(False), torch.enable_grad():
        patched = patch(model, where, coords=convention, example_inputs=example_inputs, check=False)
        known = set(coord_layers(model))
        layers = {name: one for name, one in coord_layers(patched).items() if name not in known}
        reached = reached_sites(patched, layers, loss_fn, taken.training[0])
        parts = parts_of(layers, reached, by)
        budget = _BUDGET * len(parts)
        rounds = rounds_within(budget, len(parts), seeds, len(taken.held_out), steps)
        coord_rate = _COORD_RATES * lr if coord_lr is None else coord_lr
        recipe = Recipe(rounds.steps, lr, dict.fromkeys(reached, coord_rate))
        trial = Trial(
            model, patched, parts, convention, loss_fn, taken, recipe, rounds, example_inputs
        )
        return trial.ranking([name for name in layers if name not in reached])


def _check_trainable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype is torch.float16 and parameter.requires_grad:
            raise PatchError(
                f"{name} is in float16, in which Adam's steps underflow to NaN: rank "
                "model.float(), or model.bfloat16(), with batches to match"
            )


def _check(by: Any, lr: Any, steps: Any, seeds: Any) -> None:
    if by is not None and not (isinstance(by, str) and by in ("site", "stage")):
        raise ArgumentError(f"{given('by', by)}: write 'site' or 'stage', or None")
    check_number("lr", lr)
    for name, value, least in (("steps", steps, 1), ("seeds", seeds, 2)):
        if name == "steps" and value is None:
            continue
        if type(value) is not int or value < least:
            raise ArgumentError(f"{given(name, value)}: write a whole number, {least} or more")
