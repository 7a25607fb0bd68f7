"""The concatenations that are left out of a module's forward once its convolution has coordinates.

A module that concatenates coordinates in its own code, ``self.conv(torch.cat([x, c], 1))``, keeps
its code: a copy of it, by a trace say, cannot be proven equal. Its class is replaced in place by
a subclass, whose methods run under a torch function mode in which the chosen calls of
``torch.cat`` give ``x`` alone. What makes ``c`` still runs, and nobody reads it: exporters and
compilers leave it out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from coordconv_patch.owners.call_owners import own_methods
from coordconv_patch.owners.class_in_place import InPlaceMixin, class_in_place
from coordconv_patch.running.class_change import set_class

__all__ = ["CATS", "Join", "JoinOwner", "cat_arguments", "leave_out_", "owner_obstacle"]

CATS = frozenset({torch.cat, torch.concat, torch.concatenate})
"""The names of ``torch.cat``."""


def cat_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], int]:
    """What a call of ``torch.cat`` concatenates, and along which dimension."""
    # Written so that torch.compile of torch 2.6 follows it: no zip of two lengths, no union.
    given = {**dict(zip(("tensors", "dim")[: len(args)], args, strict=True)), **kwargs}
    return tuple(given["tensors"]), int(given.get("dim", given.get("axis", 0)))


@dataclass(frozen=True)
class Join:
    """A concatenation whose coordinates are left out.

    Attributes:
        channels: Channels of each part.
        kept: Which parts are left: ``(first, end)``.
        positions: Which calls of ``torch.cat`` these are in one forward of the owner, counted
            over all (of a GraphModule: over its own), for tracers and graphs, which know no
            channels; empty if that changes from run to run.
    """

    channels: tuple[int, ...]
    kept: tuple[int, int]
    positions: frozenset[int] = frozenset()


class JoinOwner(InPlaceMixin):
    """Mixed in before the class of a module in whose code coordinates are left out."""

    _joining_class: type[nn.Module]
    """The class that the module has otherwise."""
    _joins: tuple[Join, ...] = ()

    class_below_name = "_joining_class"

    @classmethod
    def _methods_in_place(cls, below: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        return {name: _without_coordinates(below, name) for name in own_methods(below)}


def _without_coordinates(joining: type[nn.Module], name: str) -> Callable[..., Any]:
    """A method in which coordinates are left out; a model may be called by others than forward."""

    @functools.wraps(getattr(joining, name))
    def entered(self: JoinOwner, *args: Any, **kwargs: Any) -> Any:
        method = getattr(joining, name)  # looked up anew: classes get other methods at run time
        if not self._joins or _is_entered(self):
            return method(self, *args, **kwargs)
        with _LeavingOut(self, self._joins):
            return method(self, *args, **kwargs)

    return entered


def _is_entered(owner: JoinOwner) -> bool:
    """Whether a method of the same owner calls this one."""
    return any(
        type(mode) is _LeavingOut and mode.owner is owner
        for mode in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    )


def owner_obstacle(owner: nn.Module) -> str:
    """Why coordinates cannot be left out of a module's forward; empty if they can."""
    name = type(owner).__name__
    if "forward" in vars(owner):
        return f"the forward of {name}, which joins them, is replaced on the instance"
    if isinstance(owner, torch.jit.ScriptModule) or parametrize.is_parametrized(owner):
        return f"the class of {name}, which joins them, cannot be replaced"
    return ""


def leave_out_(owner: nn.Module, joins: Sequence[Join]) -> None:
    """Leave coordinates out of a module's concatenations from now on, in place."""
    if not isinstance(owner, JoinOwner):
        set_class(owner, class_in_place(JoinOwner, type(owner)))
    owner.__dict__["_joins"] = (*owner.__dict__.get("_joins", ()), *joins)


class _LeavingOut(TorchFunctionMode):
    """While entered, some concatenations give what they have besides coordinates."""

    def __init__(self, owner: nn.Module, joins: Sequence[Join]) -> None:
        super().__init__()
        self.owner = owner
        self.joins = joins
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func not in CATS:
            return func(*args, **kwargs)
        parts, dim = cat_arguments(args, kwargs)
        position = self.seen
        self.seen += 1
        for join in self.joins:
            if _is_call_of(join, parts, dim, position):
                kept = parts[join.kept[0] : join.kept[1]]
                return kept[0] if len(kept) == 1 else func(list(kept), dim=dim)
        return func(*args, **kwargs)


def _is_call_of(join: Join, parts: Sequence[Any], dim: int, position: int) -> bool:
    if any(isinstance(part, fx.Proxy) for part in parts):
        return position in join.positions
    return len(parts) == len(join.channels) and all(
        part.dim() > 2 and dim % part.dim() == 1 and part.shape[1] == channels
        for part, channels in zip(parts, join.channels, strict=True)
    )
