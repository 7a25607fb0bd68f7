"""Give a module another class."""

from __future__ import annotations

from torch import nn

__all__ = ["set_class"]


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, whatever its own ``__setattr__`` does.

    A frozen module would refuse, and coordinate layers and owners follow an assignment of somebody
    else's by themselves.
    """
    object.__setattr__(module, "__class__", kind)
