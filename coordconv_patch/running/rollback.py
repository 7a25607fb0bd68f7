"""Leave a model as it was where a change to it fails in the middle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, fx, nn

from coordconv_patch.running.class_change import set_class

__all__ = ["ModuleStates", "unchanged_on_failure", "values_restored_on_failure"]


class ModuleStates:
    """The modules of a model as they are: classes, attributes and hooks, not values of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
        dicts = [v for *_, own in self._modules for v in own.values() if isinstance(v, dict)]
        self._contents = [(each, dict(each)) for each in dicts]
        lists = [v for *_, own in self._modules for v in own.values() if type(v) is list]
        self._items = [(each, list(each)) for each in lists]  # a graph's hooks are in one

    def restore(self) -> None:
        """Put back what has changed since."""
        for module, kind, attributes in self._modules:
            own = vars(module)
            graph = attributes.get("_graph")
            if isinstance(module, fx.GraphModule) and own.get("_graph") is not graph:
                module.graph = cast(fx.Graph, graph)  # its forward is compiled from the graph
            set_class(module, kind)
            own.clear()
            own.update(attributes)
        for each, content in self._contents:
            # The same dict, emptied and filled: the handles of hooks refer to it.
            each.clear()
            each.update(content)
        for items, before in self._items:
            items[:] = before


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[ModuleStates]:
    """While entered, an exception restores the model's modules: classes, attributes and hooks.

    Gives what the modules were when it was entered. The values of tensors are not restored, see
    :func:`values_restored_on_failure`.
    """
    before = ModuleStates(model)
    try:
        yield before
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
