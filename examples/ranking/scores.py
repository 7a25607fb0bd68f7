"""Cheaper scores that the ranking was compared with: by gradients, by a read-out, by depth.

All of them are taken at the untrained coordinate weights, which are zero. None has a unit that a
user could weigh, nor an interval; the gradients' "nowhere" is a signal-over-noise below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.ranking.parts import Part

Loss = Callable[[nn.Module, Any], Tensor]
Scores = dict[str, dict[str, float]]
"""By score and by part; the larger the better."""

_STEP = 1e-2
"""Length of the step along the gradient that curvature is measured with."""


def gradient_scores(
    model: nn.Module, parts: Sequence[Part], loss: Loss, batches: Sequence[Any]
) -> Scores:
    """By the gradient of the zero weights over M batches; with g_b that of batch b::

    norm                 |mean g|
    signal over noise    |mean g|^2 / (sum var g / M)
    Fisher-weighted      sum (mean g)^2 / (mean g^2)
    Gauss-Newton step    |mean g|^2 / (2 c), c the curvature along the gradient: what the best
                         step along it takes off the loss
    """
    layers = coord_layers(model)
    weights = {part.name: _weights(layers, part) for part in parts}
    gradients = {name: [] for name in weights}
    for batch in batches:
        for name, gradient in _gradients(model, weights, loss, batch).items():
            gradients[name].append(gradient)
    scores: Scores = {}
    for name, rows in gradients.items():
        each = torch.stack(rows).double()
        mean, square = each.mean(0), each.square().mean(0)
        energy = float(mean.square().sum())
        noise = float(each.var(0).sum()) / len(each)
        curvature = _curvature(model, weights, name, mean, loss, batches[:4])
        for score, value in (
            ("gradient norm", energy**0.5),
            ("gradient, signal over noise", energy / max(noise, 1e-30)),
            ("gradient, Fisher-weighted", float((mean.square() / square.clamp(min=1e-30)).sum())),
            ("Gauss-Newton step", energy / (2 * max(abs(curvature), 1e-12))),
        ):
            scores.setdefault(score, {})[name] = value
    return scores


def _weights(layers: dict[str, CoordLayer], part: Part) -> list[Tensor]:
    return [layers[site].coord_weight for site in part.sites]


def _gradients(
    model: nn.Module, weights: dict[str, list[Tensor]], loss: Loss, batch: Any
) -> dict[str, Tensor]:
    """The gradient of one batch by part, each as one vector."""
    torch.manual_seed(0)
    flat = [weight for part in weights.values() for weight in part]
    for weight in flat:
        weight.requires_grad_(True)
    computed = torch.autograd.grad(loss(model, batch), flat)
    by_weight = dict(zip(map(id, flat), computed, strict=True))
    return {
        name: torch.cat([by_weight[id(weight)].flatten() for weight in part])
        for name, part in weights.items()
    }


def _curvature(
    model: nn.Module,
    weights: dict[str, list[Tensor]],
    name: str,
    mean: Tensor,
    loss: Loss,
    batches: Sequence[Any],
) -> float:
    """The second derivative of the loss along a part's gradient, by a difference of gradients."""
    direction = (mean / mean.norm().clamp(min=1e-30)).float()
    chosen = {name: weights[name]}
    slopes = []
    for length in (0.0, _STEP):
        _move(weights[name], direction * length)
        slopes += [
            sum(float(_gradients(model, chosen, loss, b)[name] @ direction) for b in batches)
        ]
        _move(weights[name], direction * -length)
    return (slopes[1] - slopes[0]) / _STEP / len(batches)


@torch.no_grad()
def _move(weights: Sequence[Tensor], step: Tensor) -> None:
    parts = step.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight += part.reshape(weight.shape)


def per_multiply_add(norms: dict[str, float], multiply_adds: dict[str, int]) -> dict[str, float]:
    """The squared norm of the gradient over the multiply-adds that coordinates there cost."""
    return {name: norm**2 / multiply_adds[name] for name, norm in norms.items()}


@torch.no_grad()
def unread_positions(
    model: nn.Module, parts: Sequence[Part], loss: Loss, batches: Sequence[Any]
) -> dict[str, float]:
    """What a linear read-out of one pixel's features leaves unexplained of its position.

    1 - R^2 of x and y, by ridge regression from the first site's input, on batches that the
    regression has not seen (after Islam et al. 2020, https://arxiv.org/abs/2001.08248).
    """
    layers = coord_layers(model)
    firsts = {part.sites[0]: part.name for part in parts}
    seen: dict[str, list[Tensor]] = {name: [] for name in firsts}
    handles = [
        layers[site].register_forward_pre_hook(
            lambda module, inputs, site=site: seen[site].append(inputs[0])
        )
        for site in firsts
    ]
    for batch in batches:
        torch.manual_seed(0)
        loss(model, batch)
    for handle in handles:
        handle.remove()
    return {name: _unexplained(seen[site]) for site, name in firsts.items()}


def _unexplained(inputs: Sequence[Tensor]) -> float:
    half = len(inputs) // 2
    features, positions = _pixels(torch.cat(list(inputs[:half])))
    scale = features.std(0).clamp(min=1e-6)
    gram = (features / scale).T @ (features / scale)
    ridge = 1e-3 * len(features) * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + ridge, (features / scale).T @ positions)
    features, positions = _pixels(torch.cat(list(inputs[half:])))
    left = (features / scale) @ solution - positions
    return float(left.square().mean() / positions.var(0, unbiased=False).mean().clamp(min=1e-9))


def _pixels(maps: Tensor) -> tuple[Tensor, Tensor]:
    """At most 4000 random pixels of maps ``(N, C, H, W)``: features and a one, positions."""
    count, _, height, width = maps.shape
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(count * height * width, generator=generator)[:4000]
    features = maps.permute(0, 2, 3, 1).flatten(0, 2)[chosen].double()
    place = chosen % (height * width)
    x, y = place % width, place // width
    positions = torch.stack([x / max(width - 1, 1), y / max(height - 1, 1)], 1).double() * 2 - 1
    return torch.cat([features, torch.ones(len(features), 1).double()], 1), positions
