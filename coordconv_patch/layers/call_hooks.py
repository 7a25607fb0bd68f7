"""Coordinates for some calls of a convolution module, and not for the others.

A detector's head runs one convolution at every level of a feature pyramid; one may want
coordinates at the finest level only. The convolution keeps its class and stays plain; it
gets a :class:`CoordBranch` as a submodule, and a hook that adds the branch to the output of
the chosen calls::

    conv(x)  ->  conv(x) + conv(c, W_c)   at the calls chosen        conv(x) at the others

Calls are counted while their *caller* runs: the innermost module during whose single call
all of them happen, such as the head. Its hooks start and stop the counting, so a model of
any control flow can be counted, and a call outside the caller is an error, not a miscount.
Each thread counts for itself, and each call of the caller afresh, one within another too.
"""

from __future__ import annotations

import threading
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.branch import BRANCH_NAME, CoordBranch
from coordconv_patch.layers.capture import is_capturing, is_transforming
from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.forward_watch import ForwardWatch
from coordconv_patch.layers.geometry import ConvGeometry, Padding, ndim_of
from coordconv_patch.layers.padding_probe import TORCHS_OWN, padding_of, pads_as_torch, pads_by

__all__ = [
    "add_to_calls_",
    "branches_without_hook",
    "chosen_calls_of",
    "places_of_hook",
    "remove_from_calls_",
]


def add_to_calls_(
    model: nn.Module, name: str, chosen: ChosenCalls, coords: Coordinates, padding: Padding
) -> None:
    """Give some calls of a convolution module coordinates, in place; their weight starts at zero.

    Args:
        model: The model.
        name: Qualified name of the convolution module.
        chosen: Which calls.
        coords: The convention.
        padding: How the convolution pads its input.
    """
    conv, caller = cast(_ConvNd, model.get_submodule(name)), model.get_submodule(chosen.caller)
    weight = conv.weight
    branch = CoordBranch(
        ConvGeometry.of(conv), coords, padding=padding, device=weight.device, dtype=weight.dtype
    )
    branch.training = conv.training
    branch.chosen_calls = chosen
    branch.__dict__[_FOLLOWED] = _padding_marks(conv)
    count = _Count(name, chosen)
    conv.add_module(BRANCH_NAME, branch)
    # First among the hooks, so that the others see what the convolution now computes.
    conv.register_forward_hook(_AddBranch(count), prepend=True, with_kwargs=True)
    caller.register_forward_pre_hook(_StartCounting(count), prepend=True)
    caller.register_forward_hook(_StopCounting(count), always_call=True)


def chosen_calls_of(module: nn.Module) -> ChosenCalls | None:
    """Which calls of a convolution module have coordinates; ``None`` if none were chosen."""
    hook = _branch_hook(module)
    return None if hook is None else hook.count.chosen


def places_of_hook(module: nn.Module) -> list[tuple[dict[Any, Any], Any, Any]]:
    """What holds the hook that adds a branch to chosen calls of a convolution module.

    A dict, the key in it and its value: of the hook, and of the module's dict of hooks. Empty
    if there is no such hook.
    """
    hooks: Any = module._forward_hooks
    places = [(hooks, key, hook) for key, hook in hooks.items() if isinstance(hook, _AddBranch)]
    return [*places[:1], (module.__dict__, "_forward_hooks", hooks)] if places else []


def branches_without_hook(module: nn.Module) -> list[CoordBranch]:
    """The branch of chosen calls of a convolution module, if somebody took its hook away."""
    branch = module._modules.get(BRANCH_NAME) if isinstance(module, _ConvNd) else None
    if not isinstance(branch, CoordBranch) or _FOLLOWED not in branch.__dict__:
        return []  # others are added by the module that calls the convolution's function
    return [branch] if _branch_hook(module) is None else []


def remove_from_calls_(model: nn.Module, conv: nn.Module) -> None:
    """Inverse of :func:`add_to_calls_` for one convolution module of a model.

    If somebody took the branch's own hook away, those on its caller stay: they only count.
    """
    added = _branch_hook(conv)
    for module in model.modules() if added is not None else ():
        for registered in _hook_dicts(module):
            for key, hook in list(registered[0].items()):
                if isinstance(hook, _CountHook) and added and hook.count is added.count:
                    for each in registered:
                        each.pop(key, None)
    delattr(conv, BRANCH_NAME)


class _Running(threading.local):
    """The calls of a convolution's caller that this thread is in, outermost first.

    Of each, how often it has called the convolution so far.
    """

    def __init__(self) -> None:
        self.counts: list[int] = []


class _Count:
    """Counts the calls of one convolution, in every thread by itself.

    Copies and pickles start outside of the caller.
    """

    def __init__(self, name: str, chosen: ChosenCalls) -> None:
        self.name = name
        self.chosen = chosen
        self.running = _Running()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "chosen": self.chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self.chosen = state["name"], state["chosen"]
        self.running = _Running()


class _CountHook:
    """A hook that pickles and copies with the module that it hangs on."""

    def __init__(self, count: _Count) -> None:
        self.count = count


class _StartCounting(_CountHook):
    def __call__(self, caller: nn.Module, args: tuple[Any, ...]) -> None:
        self.count.running.counts.append(0)


class _StopCounting(_CountHook):
    def __call__(self, caller: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counts = self.count.running.counts
        if counts:  # else the caller failed before the counting began
            counts.pop()


class _AddBranch(_CountHook):
    def __call__(
        self, conv: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        count, counts = self.count, self.count.running.counts
        if not counts:
            place = f"{count.chosen.caller!r}" if count.chosen.caller else "the model"
            raise PatchError(
                f"{count.name} has coordinates at {count.chosen}, counted while {place} runs, but "
                "was called outside of it, so which call this is cannot be told (gradient "
                f"checkpointing inside {place}, a thread of its own, a direct call, a traced "
                f"copy?). Checkpoint and "
                f"call {place} as a whole, or patch every call of {count.name}"
            )
        index = counts[-1]
        counts[-1] = index + 1
        if index not in count.chosen.indices:
            return output
        branch = cast(CoordBranch, getattr(conv, BRANCH_NAME))
        if branch.__dict__.get(_FOLLOWED) != _padding_marks(conv):
            _follow_padding(count.name, cast(_ConvNd, conv), branch)
        branch.check_channels(output, branch.coord_weight)
        source = args[0] if args else kwargs["input"]
        if not (is_capturing() or is_transforming()):
            _check_padding(count.name, cast(_ConvNd, conv), branch, source)
        return output + branch(source).to(output.dtype)


_FOLLOWED = "_followed_padding"
"""Under this name a branch keeps the :func:`_padding_marks` that it was made for."""


def _padding_marks(conv: nn.Module) -> tuple[Any, ...]:
    """What tells whether a convolution module was told to pad otherwise."""
    return (
        conv.padding,
        conv.padding_mode,
        tuple(cast(_ConvNd, conv)._reversed_padding_repeated_twice),
        conv.stride,
        conv.dilation,
        conv.__dict__.get("_conv_forward"),
        _has_torchs_methods(type(conv)),
    )


def _has_torchs_methods(kind: Any) -> bool:
    """Whether torch wrote what a class of convolutions computes, which may be replaced any time."""
    return any(
        kind.forward is forward and kind._conv_forward is conv_forward
        for forward, conv_forward in TORCHS_OWN.values()
    )


def _check_padding(name: str, conv: _ConvNd, branch: CoordBranch, source: Tensor) -> None:
    """Look once for each input size and mode whether a class of its own pads by its rule."""
    weight = conv._parameters.get("weight")
    if pads_as_torch(conv, conv.forward) or weight is None or weight.is_meta:
        return
    watch: ForwardWatch = branch.__dict__.setdefault("_watch", ForwardWatch())
    size = tuple(source.shape[-ndim_of(conv) :])
    key = (size, conv.training, branch.coord_padding)
    if watch.knows(key, []):
        return
    if not pads_by(conv, conv.forward, size, branch.coord_padding):
        _follow_padding(name, conv, branch)
        if not pads_by(conv, conv.forward, size, branch.coord_padding):
            raise PatchError(
                f"{name} pads an input of size {size} by another rule than smaller ones; the "
                "coordinates of its chosen calls could not follow. Unpatch the model first"
            )
    watch.note((size, conv.training, branch.coord_padding), [])


def _follow_padding(name: str, conv: _ConvNd, branch: CoordBranch) -> None:
    """Let the coordinates of chosen calls be padded as their convolution pads now."""
    if is_capturing():
        raise PatchError(
            f"how {name} pads was changed since it last ran: run the model once before it is "
            "compiled, traced or exported"
        )
    try:
        branch.coord_padding = padding_of(conv)
    except PatchError as error:
        raise PatchError(
            f"the padding of {name} was changed after it got coordinates, which cannot follow: "
            f"{error}. Undo the change, or unpatch the model first"
        ) from error
    branch.coord_geometry = ConvGeometry.of(conv)
    branch.__dict__[_FOLLOWED] = _padding_marks(conv)


def _branch_hook(module: nn.Module) -> _AddBranch | None:
    hooks = module._forward_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, _AddBranch)), None)


def _hook_dicts(module: nn.Module) -> tuple[tuple[dict[int, Any], ...], ...]:
    """Where a module keeps its hooks, and what it notes of them."""
    return (
        (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    )
