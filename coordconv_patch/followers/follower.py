"""What the hooks of one followed module share: whom they place, and what held before."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.grid_memo import GridMemo
from coordconv_patch.layers.places import Placed, Places

__all__ = ["Begin", "End", "Follower", "FollowerHook", "followers_of", "hook_", "release_"]


@dataclass
class _Held:
    """What held for some layers when a forward pass began, and what to go back to."""

    places: Places
    state: tuple[Any, ...]
    own: Placed | None = None
    """What the follower has entered."""
    outer: Placed | None = None
    """What it has entered that in."""


class _Running(threading.local):
    """The forward passes of the followed module that this thread is in, outermost first."""

    def __init__(self) -> None:
        self.passes: list[list[_Held]] = []


class Follower:
    """Places the layers of one module while that runs, in every thread by itself.

    Copies, and what pickle makes, place the layers of the copy, and start outside of its forward.

    Args:
        kind: What it follows: ``"padding"``, ``"letterbox"`` or ``"regions"``; or
            ``"whole regions"``, see :class:`coordconv_patch.followers.regions.RegionsAreWhole`.
        places: What the layers ask.
    """

    def __init__(self, kind: str, places: Iterable[Places]) -> None:
        self.kind = kind
        self.places = list(places)
        self._running = _Running()

    def begin(self) -> None:
        """The module's forward begins."""
        self._running.passes.append([_Held(each, each.state()) for each in self.places])

    def end(self) -> None:
        """The module's forward has ended, or failed."""
        passes = self._running.passes
        if passes:  # else it failed before this began
            for held in passes.pop():
                held.places.restore(held.state)

    @property
    def is_running(self) -> bool:
        """Whether this thread is in the module's forward."""
        return bool(self._running.passes)

    def place(
        self,
        own: Tensor,
        *,
        has_outside: bool = False,
        samples: Tensor | None = None,
        in_input: bool = False,
    ) -> None:
        """Enter places until the module's forward ends, or until the next call of this.

        Args:
            own: From what layers get to the pictures that the module was given, shape (N, 2, 3)
                or (1, 2, 3).
            has_outside: Whether the pictures were padded: coordinates are zero outside.
            samples: Of which picture each of the N is a part, shape (N,); ``None``: of its own.
            in_input: Whether ``own`` leads to the network's input, which may be padded pictures.
        """
        for held in self._running.passes[-1]:
            now = held.places.state()[0]
            if now is None or now is not held.own:
                held.outer = held.places.held()
            outer = None if held.outer is None else _outer_of(held.outer, in_input)
            if outer is not None and samples is not None and len(outer) > 1:
                outer = outer[samples.to(outer.device)]
            theta = own if outer is None else _composed(outer, own)
            maps = {} if held.outer is None else held.outer.maps
            held.own = Placed(theta, own if has_outside else None, outer, maps, GridMemo())
            held.places.enter(held.own)

    def place_as_whole(self) -> None:
        """The same, of what layers get as whole pictures, whatever held before."""
        for held in self._running.passes[-1]:
            held.places.enter(Placed(torch.eye(2, 3).unsqueeze(0)))

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self.kind, "places": self.places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._running = _Running()


def _outer_of(placed: Placed, in_input: bool) -> Tensor | None:
    """The places of a network's input, or of the pictures in it, which lack their padding."""
    return placed.theta if in_input or placed.picture is None else placed.outer


def _composed(outer: Tensor, inner: Tensor) -> Tensor:
    """The place that is one inside of another, shape (N, d, d + 1)."""
    outer = outer.to(inner)
    if len(outer) != len(inner) and 1 not in (len(outer), len(inner)):
        raise PatchError(
            f"the model gets {len(inner)} pictures, and there are places for {len(outer)}: give "
            "one place for each picture of the batch, or one for all"
        )
    linear, shift = outer[:, :, :-1], outer[:, :, -1:]
    own, own_shift = inner[:, :, :-1], inner[:, :, -1:]
    return torch.cat((linear @ own, linear @ own_shift + shift), dim=-1)


class FollowerHook:
    """A hook that pickles and copies with the module that it hangs on."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower


class Begin(FollowerHook):
    """Before the forward of the followed module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.follower.begin()


class End(FollowerHook):
    """After it, and after errors."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.follower.end()


def hook_(module: nn.Module, begin: Begin) -> None:
    """Let a follower begin and end with a module's forward."""
    module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
    module.register_forward_hook(End(begin.follower), always_call=True)


def followers_of(model: nn.Module) -> list[tuple[str, Follower]]:
    """The followers in a model, with the names of the modules that they begin and end with."""
    return [
        (name, hook.follower)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, Begin)
    ]


def release_(model: nn.Module, kind: str | None = None) -> None:
    """Take the hooks of followers away, of one kind or all."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for registered in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ),
        ):
            hooks: dict[int, Any] = registered[0]
            for key, hook in list(hooks.items()):
                if isinstance(hook, FollowerHook) and kind in (None, hook.follower.kind):
                    for each in registered:
                        each.pop(key, None)
