"""Run a model for a look at it, and leave it as it was.

A look sets flags and attributes of the model, and puts them back. Two looks at a time would
each put back what the other had set, so there is one lock, :data:`LOOK`, that every look at
any model holds: looks are rare, and one lock cannot be taken in the wrong order. Forward
passes of other threads take no lock. They run as ever in a model that is in evaluation mode,
because the flags that are right already are not touched.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from coordconv_patch.errors import CoordConvPatchError, PatchError
from coordconv_patch.running.forks import fork_safe
from coordconv_patch.running.kept_tensors import KeptGradients, KeptTensors
from coordconv_patch.running.random_states import random_states_kept

__all__ = ["LOOK", "Model", "copied", "evaluation", "in_mode", "state_restored"]

Model = TypeVar("Model", bound=nn.Module)
"""The class of a model, which what is done to it or to its copy keeps."""

LOOK = fork_safe(threading.RLock())
"""Held by the thread that looks at a model, copies one or changes one."""


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every submodule in training or evaluation mode; each one's own flag is put back."""
    with LOOK:
        # TorchScript's frozen modules have no mode.
        modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")]
        try:
            for module, _ in modes:
                _set_mode(module, training)
            yield
        finally:
            for module, mode in modes:
                _set_mode(module, mode)


def _set_mode(module: nn.Module, training: bool) -> None:
    if module.training != training:
        module.training = training


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random states are put back."""
    with in_mode(model, training=False), torch.no_grad(), random_states_kept(_cuda_devices(model)):
        yield


@contextmanager
def state_restored(model: nn.Module, *, runs: bool = False) -> Iterator[None]:
    """Undo what a look at a model leaves behind: attributes, buffers and random states.

    A trace would leave proxies, and counts one more batch in every batch norm whose own code
    does the counting.

    Args:
        model: The model.
        runs: Whether it really runs, and may change its parameters and their gradients, as those
            do that keep their weights small. A trace has proxies in their place. This takes
            a copy of the parameters for as long.
    """
    with LOOK:
        state = _State(model, runs)
        try:
            with random_states_kept(_cuda_devices(model)):
                yield
        finally:
            state.restore()


class _State:
    """What a look may change of a model."""

    def __init__(self, model: nn.Module, runs: bool) -> None:
        modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self.attributes = [held for module in modules for held in _attributes_of(module)]
        self.containers = _Containers()
        for module in modules:
            attributes = dict(vars(module))
            self.containers.note(v for k, v in attributes.items() if k not in _RESTORED_ABOVE)
        parameters = list(model.parameters()) if runs else []
        tensors = (*model.buffers(), *self.containers.tensors, *parameters)
        self.tensors = KeptTensors(
            each for each in tensors if runs or not isinstance(each, nn.Parameter)
        )
        self.gradients = KeptGradients(parameters)

    def restore(self) -> None:
        """Put back what has changed since."""
        for holder, contents in self.attributes:
            _restore(holder, contents)
        self.containers.restore()
        self.tensors.restore()
        self.gradients.restore()


def _attributes_of(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The dicts that hold a module's attributes, each with a copy of its contents."""
    holders = (vars(module), module._buffers, module._parameters, module._modules)
    return [(holder, dict(holder)) for holder in cast("tuple[dict[str, Any], ...]", holders)]


def _restore(holder: dict[str, Any], contents: dict[str, Any]) -> None:
    for name in [name for name in list(holder) if name not in contents]:
        holder.pop(name, None)
    for name, value in contents.items():
        if name not in holder or holder[name] is not value:
            holder[name] = value


_RESTORED_ABOVE = frozenset({"_parameters", "_buffers", "_modules"})
"""Containers that :func:`_attributes_of` has in its care. Hooks are not: transformers hangs some on
a model in its first forward pass, and notes in an attribute that it has."""


class _Containers:
    """Lists, dicts and the like that modules hold: a forward pass may keep things in them.

    LeViT's attention, for one, keeps its biases in a dict by device, and so would keep a
    tracer's proxies.
    """

    def __init__(self) -> None:
        self.noted: dict[int, tuple[Any, Any]] = {}
        self.tensors: list[Tensor] = []
        """Those among the values, and in the containers."""

    def note(self, values: Iterable[Any]) -> None:
        """Remember the contents of every container among some values, and of those in it."""
        for value in values:
            if isinstance(value, Tensor):
                self.tensors.append(value)
            if not isinstance(value, (dict, list, set, deque)) or id(value) in self.noted:
                continue
            # Not copy.copy: a subclass may copy in its own way. Most are empty dicts of hooks.
            contents = _contents_of(value) if len(value) else []
            self.noted[id(value)] = (value, contents)
            if contents:
                self.note(value.values() if isinstance(value, dict) else contents)

    def restore(self) -> None:
        """Put back what has changed since."""
        for container, contents in self.noted.values():
            if not contents and len(container) == 0:
                continue
            now = _contents_of(container)
            if len(now) == len(contents) and all(map(_is_same, now, contents)):
                continue
            container.clear()
            if isinstance(container, (dict, set)):
                container.update(contents)
            else:
                container.extend(contents)


def _contents_of(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _is_same(left: Any, right: Any) -> bool:
    """Identity, of both parts for a dict's item; comparing tensors or proxies would compute."""
    if isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right) == 2:
        return left[0] is right[0] and left[1] is right[1]
    return left is right


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def copied(
    model: Model,
    error: type[CoordConvPatchError] = PatchError,
    advice: str = "use the in-place form, patch_ or unpatch_",
) -> Model:
    """A deep copy of a model; if it cannot be copied, an error that ends in the advice."""
    try:
        with LOOK:  # while another thread looks at it, its flags and hooks are not its own
            return copy.deepcopy(model)
    except Exception as reason:
        raise error(f"the model cannot be deep-copied ({reason}): {advice}") from reason
