"""Build a catalogue model and run it, reproducibly."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import coordconv_patch as ccp
from zoo.entry import Entry

__all__ = [
    "build",
    "fill_coords_",
    "first_difference",
    "in_double",
    "relative_difference",
    "run",
    "seed_everything",
    "split",
    "tensors",
]


def seed_everything(seed: int = 0) -> None:
    """Seed every generator that a model may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build(entry: Entry) -> nn.Module:
    """The entry's model, in a state where every convolution matters to the output.

    Fresh models hide faults: batch norms that start at gamma 0 and layer scales of 1e-6
    switch whole branches off, and running statistics of 0 and 1 let the activations
    explode or die out. So small parameters are drawn anew, and the running statistics are
    taken from one pass in training mode where that works.
    """
    seed_everything()
    model = entry.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < 1e-2:
                parameter.normal_(std=0.05)
    _calibrate_(model, entry)
    return model.eval()


def _calibrate_(model: nn.Module, entry: Entry) -> None:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    before = copy.deepcopy(model.state_dict())
    try:
        for norm in norms:
            norm.momentum = 1.0  # the statistics of this very batch
        run(model, entry.example(training=True), training=True)
    except Exception:
        model.load_state_dict(before)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of example inputs."""
    if not isinstance(inputs, tuple):
        return (inputs,), {}
    if inputs and isinstance(inputs[-1], dict):
        return inputs[:-1], inputs[-1]
    return inputs, {}


def run(
    model: nn.Module, inputs: Any, *, training: bool = False, grad: bool = False, seed: int = 1
) -> list[Tensor]:
    """The tensors of the model's output, in a mode, from seeded generators."""
    model.train(training)
    seed_everything(seed)
    args, kwargs = split(inputs)
    with torch.set_grad_enabled(grad):
        found = tensors(model(*args, **kwargs))
    model.eval()
    return found


def tensors(values: Any) -> list[Tensor]:
    """The tensors in nested containers, output classes included, in order."""
    if isinstance(values, Tensor):
        return [values]
    if dataclasses.is_dataclass(values) and not isinstance(values, (type, Mapping)):
        values = [getattr(values, field.name) for field in dataclasses.fields(values)]
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in tensors(value)]
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def first_difference(left: list[Tensor], right: list[Tensor]) -> str:
    """What keeps two outputs from being equal to the last bit; empty if nothing does."""
    if len(left) != len(right):
        return f"{len(left)} tensors against {len(right)}"
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index}: {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}"
        same = a == b
        if a.is_floating_point():
            same |= a.isnan() & b.isnan()
        if not bool(same.all()):
            apart = (a.double() - b.double()).abs().nan_to_num(float("inf")).max()
            return f"output {index} of shape {tuple(a.shape)} differs by {apart:.3g}"
    return ""


def relative_difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Largest difference, each relative to the largest magnitude of that output in ``left``."""
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        a, b = a.detach().double(), b.detach().double()
        if not a.numel():
            continue
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        mask = a.isfinite()
        if not mask.any():
            continue
        scale = max(float(a[mask].abs().max()), float(np.finfo(np.float32).tiny))
        worst = max(worst, float((a[mask] - b[mask]).abs().max()) / scale)
    return worst


def fill_coords_(model: nn.Module, strength: float = 0.3) -> None:
    """Seeded coordinate weights, as strong as ``strength`` of the convolution's own weights."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "coord_weight", None)
            if isinstance(weight, nn.Parameter):
                own = getattr(module, "weight", None)
                std = float(own.std()) if isinstance(own, Tensor) and own.numel() > 1 else 0.0
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(drawn * (strength * std if std > 0 else 0.02))
    assert ccp.coord_parameters(model)


def in_double(values: Any) -> Any:
    """Inputs with every float tensor in float64."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, values
    )
