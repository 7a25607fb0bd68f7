"""Leave a model as it was where a change to it fails in the middle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["ModuleStates", "unchanged_on_failure", "values_restored_on_failure"]


class ModuleStates:
    """The modules of a model as they are: classes, attributes and hooks, not values of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_Before.of(module) for module in model.modules()]

    def restore(self) -> None:
        """Put back what has changed since."""
        for each in self._modules:
            each.restore()


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """While entered, an exception restores the model's modules: classes, attributes and hooks.

    The values of tensors are not restored, see :func:`values_restored_on_failure`.
    """
    before = ModuleStates(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def values_restored_on_failure(tensors: Iterable[Tensor]) -> Iterator[None]:
    """While entered, an exception restores the tensors' values."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.copy_(values)
        raise


@dataclass(frozen=True)
class _Before:
    """A module as it was: its class, its attributes, and what its dicts held."""

    module: nn.Module
    kind: type
    attributes: dict[str, Any]
    contents: list[tuple[dict[Any, Any], dict[Any, Any]]]

    @classmethod
    def of(cls, module: nn.Module) -> _Before:
        attributes = dict(vars(module))
        dicts = [value for value in attributes.values() if isinstance(value, dict)]
        return cls(module, type(module), attributes, [(each, dict(each)) for each in dicts])

    def restore(self) -> None:
        module, own = self.module, vars(self.module)
        if (
            isinstance(module, fx.GraphModule)
            and own.get("_graph") is not self.attributes["_graph"]
        ):
            module.graph = self.attributes["_graph"]  # its forward is compiled from the graph
        object.__setattr__(module, "__class__", self.kind)  # no layer is to follow this change
        own.clear()
        own.update(self.attributes)
        for each, content in self.contents:
            # The same dict, emptied and filled: the handles of hooks refer to it.
            each.clear()
            each.update(content)
