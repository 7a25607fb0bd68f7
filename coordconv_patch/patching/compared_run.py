"""One run of a model on its example inputs, which can be repeated to the last bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.given_maps import blank_maps
from coordconv_patch.patching.output_values import values_in
from coordconv_patch.running.inputs import run_model, writable_inputs
from coordconv_patch.running.random_states import seed_all
from coordconv_patch.running.untouched import in_mode, state_restored

__all__ = ["ComparedRun", "seeded"]


@dataclass(frozen=True)
class ComparedRun:
    """One forward pass of a model on example inputs.

    Attributes:
        outputs: Its tensors and plain values, by their place in the output; ``None`` if the
            model fails in this mode.
        reached: The coordinate layers that ran, by site name.
        error: Why it failed.
    """

    outputs: dict[str, Any] | None
    reached: frozenset[str] = frozenset()
    error: str = ""

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, *, training: bool) -> ComparedRun:
        """Run a model in one mode; it is left as it was, random state included."""
        reached: set[str] = set()
        try:
            with (
                seeded(model, training),
                torch.set_grad_enabled(training),
                _reached_noted(model, reached),
                blank_maps(model),
            ):
                output = run_model(model, writable_inputs(example_inputs))
                return cls(dict(values_in(output)), frozenset(reached))
        except PatchError as error:
            # Where this package refused in the middle of the run, that says more.
            own = isinstance(error.__cause__, PatchError)
            return cls(None, frozenset(reached), str(error.__cause__ if own else error))


@contextlib.contextmanager
def seeded(model: nn.Module, training: bool) -> Iterator[None]:
    """Every run draws the same random numbers, and leaves no trace."""
    with state_restored(model, runs=True), in_mode(model, training=training):
        seed_all(0)
        yield


@contextlib.contextmanager
def _reached_noted(model: nn.Module, reached: set[str]) -> Iterator[None]:
    def hook_for(name: str) -> Any:
        return lambda *_: reached.add(name)

    handles = [
        layer.register_forward_pre_hook(hook_for(name))
        for name, layer in coord_layers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
