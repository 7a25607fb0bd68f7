"""Let traced code see a tensor where a proxy stands in for one.

Python code asks ``isinstance(x, Tensor)`` and takes another way for what is not. C++ code asks the
same question before it reads the memory of a tensor, so a proxy must not simply say that it
is one: custom autograd Functions, for one, would end the process.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["TensorProxy", "isinstance_answered"]


class TensorProxy(fx.Proxy):
    """A proxy that certainly stands for a tensor."""


def _isinstance(value: Any, classes: Any) -> bool:
    """As Python's own, but a :class:`TensorProxy` is a tensor, and not a parameter."""
    if builtins.isinstance(value, classes):
        return True
    return type(value) is TensorProxy and issubclass(Tensor, classes)


@contextlib.contextmanager
def isinstance_answered(module: nn.Module) -> Iterator[None]:
    """While entered, the code of a module's parts sees tensors where there are proxies of them.

    The files that hold the code get an ``isinstance`` of their own; other threads that run the
    same code get the answers that they always get.
    """
    changed = [names for names in _globals_of(module) if "isinstance" not in names]
    try:
        for names in changed:
            names["isinstance"] = _isinstance
        yield
    finally:
        for names in changed:
            del names["isinstance"]


def _globals_of(module: nn.Module) -> list[dict[str, Any]]:
    """The global names of the code of all forwards in a module, and of ``torch.is_tensor``."""
    by_id = {id(names): names for names in (torch.is_tensor.__globals__,)}
    for kind in dict.fromkeys(type(part) for part in module.modules()):
        for base in kind.__mro__:
            names = getattr(inspect.unwrap(vars(base).get("forward", len)), "__globals__", None)
            # torch.nn's own layers are not traced.
            if names is not None and not str(names.get("__name__")).startswith("torch.nn."):
                by_id[id(names)] = names
    return list(by_id.values())
