"""Fine-tuning a patched model: its coordinate parameters, parameter groups, freezing."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from coordconv_patch.arguments import check_number, given
from coordconv_patch.errors import ArgumentError, PatchError
from coordconv_patch.graphs.programs import require_coord_layers

__all__ = [
    "add_to_optimizer_",
    "coord_parameters",
    "coord_parameters_of",
    "param_groups",
    "train_only_coords_",
]

_BEHIND_COORD_WEIGHT = re.compile(r"coord_weight(_\w+)?|parametrizations\.coord_weight\..+")
"""A layer's own names: torch.nn.utils.prune makes ``coord_weight_orig`` of ``coord_weight``."""


def coord_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The coordinate weights of a patched model, in order of registration, each once.

    Of a coordinate weight that is computed from others (pruned, parametrized), the
    parameters that it is computed from.

    Raises:
        PatchError: If the model is not patched.
    """
    weights = {
        id(parameter): parameter
        for layer in require_coord_layers(model).values()
        for parameter in coord_parameters_of(layer)
    }
    if not weights:
        raise PatchError(
            "a wrapper has taken the coordinate weights out of their layers: pass the model before "
            "it is wrapped"
        )
    return list(weights.values())


def coord_parameters_of(layer: nn.Module) -> list[nn.Parameter]:
    """The same of one coordinate layer; none if a wrapper has taken them away."""
    named = layer.named_parameters()
    return [parameter for name, parameter in named if _BEHIND_COORD_WEIGHT.fullmatch(name)]


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    coord_lr: float | None = None,
    weight_decay: float | None = None,
    coord_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Two parameter groups for a torch optimizer: the model's own and the coordinate weights.

    Parameters that do not require a gradient are left out, an empty group too.

    Args:
        model: A patched model.
        lr: Learning rate of the model's own weights; ``None``: the optimizer's.
        coord_lr: Learning rate of the coordinate weights; ``None``: as ``lr``. They start
            at zero, so a higher one (say 10 times) is often wanted.
        weight_decay: Of the model's own weights; ``None``: the optimizer's.
        coord_weight_decay: Of the coordinate weights. The default leaves it off.

    Returns:
        Groups with the keys ``params``, ``name`` and the options that were given.

    Raises:
        PatchError: If the model is not patched.
        ArgumentError: If a rate or decay is not a finite number, 0 or more.

    Example:
        >>> groups = param_groups(model, lr=1e-4, coord_lr=1e-3)  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(groups)                 # doctest: +SKIP
    """
    check_number("lr", lr, optional=True)
    check_number("coord_lr", coord_lr, optional=True)
    check_number("weight_decay", weight_decay, optional=True)
    check_number("coord_weight_decay", coord_weight_decay)
    coords = coord_parameters(model)
    coord_ids = {id(weight) for weight in coords}
    base = [p for p in model.parameters() if id(p) not in coord_ids]
    options: list[dict[str, Any]] = [
        {"name": "base", "params": base, "lr": lr, "weight_decay": weight_decay},
        {
            "name": "coords",
            "params": coords,
            "lr": lr if coord_lr is None else coord_lr,
            "weight_decay": coord_weight_decay,
        },
    ]
    groups = []
    for group in options:
        group["params"] = [p for p in group["params"] if p.requires_grad]
        if group["params"]:
            groups.append({key: value for key, value in group.items() if value is not None})
    return groups


def train_only_coords_(model: nn.Module) -> nn.Module:
    """Freeze everything but the coordinate weights, in place.

    Batch norm still updates its running statistics in training mode, as for any
    frozen model; keep the model in evaluation mode if they should not move.

    Returns:
        The model itself.

    Raises:
        PatchError: If the model is not patched; nothing is frozen then.
    """
    coords = coord_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in coords:
        weight.requires_grad_(True)
    return model


def add_to_optimizer_(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
) -> None:
    """Give the coordinate weights of a model patched in place to an optimizer that exists already.

    They become a parameter group of their own, with the optimizer's defaults for
    what is not given. Build learning-rate schedulers afterwards: those built before
    know the old groups only.

    Args:
        optimizer: The optimizer.
        model: A patched model.
        lr: Learning rate of the coordinate weights; ``None``: that of the first group.
        weight_decay: Of the coordinate weights; only for optimizers that have it.

    Raises:
        PatchError: If the model is not patched, or the optimizer has its coordinate
            weights already.
        ArgumentError: If it is not an optimizer, or a number is not finite, 0 or more.
    """
    if not all(hasattr(optimizer, name) for name in ("param_groups", "add_param_group")):
        raise ArgumentError(
            f"{given('optimizer', optimizer)}: pass the optimizer first, then the model"
        )
    check_number("lr", lr, optional=True)
    check_number("weight_decay", weight_decay)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [weight for weight in coord_parameters(model) if id(weight) not in known]
    if not new:
        raise PatchError("the optimizer has the coordinate weights already")
    group: dict[str, Any] = {"params": new, "name": "coords"}
    group["lr"] = optimizer.param_groups[0]["lr"] if lr is None else lr
    if "weight_decay" in optimizer.defaults:
        group["weight_decay"] = weight_decay
    optimizer.add_param_group(group)
