"""Which part of a picture each sample of a batch is, as the coordinate layers of a model see it.

A *place* is an affine map, per sample, from positions in the network's input to positions in
the whole picture; see :func:`coordconv_patch.places`. The layers of a model share one
:class:`Places`, and ask it at each forward.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.grid_memo import GridMemo
from coordconv_patch.layers.recomputation import checkpoints_around, is_in_backward
from coordconv_patch.running.forks import fork_safe
from coordconv_patch.running.per_context import PerContext

__all__ = ["Placed", "Places", "entered", "maps_entered", "shared_places"]


class Placed(NamedTuple):
    """What holds for the samples of a batch.

    Attributes:
        theta: From the network's input to the whole pictures, shape (N, d, d + 1).
        picture: From the network's input to the pictures in it that were padded, shape
            (N, d, d + 1): coordinates are zero at the pixels outside of them, as they are where
            a convolution pads by zeros. ``None``: nothing is outside.
        outer: From the padded pictures to the whole ones; ``None``: they are those.
        maps: Maps given with the call, by name; see :class:`coordconv_patch.Given`.
        memo: What layers computed from all this; ``None``: nothing is kept.
    """

    theta: Tensor
    picture: Tensor | None = None
    outer: Tensor | None = None
    maps: Mapping[str, Tensor] = MappingProxyType({})
    memo: GridMemo | None = None


class _PerThread(threading.local):
    """What was entered for a part of a forward pass, which one thread runs from end to end.

    A list, for torch.compile guards items and not attributes.
    """

    def __init__(self) -> None:
        self.placed: list[Placed | None] = [None]
        self.around: list[tuple[Any, ...]] = [()]  # the checkpoints in which it was entered


class _Mark:
    """Tells places that were entered from others, wherever a context has them."""

    was_left_elsewhere = False


class Places:
    """The places of the samples that a model's layers see now.

    Copies, and what pickle makes, keep the lasting places and nothing of the entered ones.

    Attributes:
        lasting: For every thread, shape (N, d, d + 1); ``None``: none.
    """

    def __init__(self, lasting: Tensor | None = None) -> None:
        self.lasting = lasting
        self._in_forward = _PerThread()
        # By code that may be suspended meanwhile, as tasks and generators are: the placed, the
        # checkpoints around, a mark, and such a list of what holds again when it is left.
        self._in_context = PerContext()
        self._was_used = False

    def now(self) -> Placed | None:
        """The places that hold here and now; ``None``: samples are whole pictures.

        Gradient checkpointing runs layers again in the backward pass, when other places may
        hold, or none: they then see those of the first run, unless the code that runs again has
        entered its places itself.

        Raises:
            PatchError: If code that torch does not know runs layers again, after their places
                were left.
        """
        return self._now(is_strict=True)

    def held(self) -> Placed | None:
        """The same, for code that is about to enter other places within them."""
        return self._now(is_strict=False)

    def _now(self, *, is_strict: bool) -> Placed | None:
        placed = self._in_forward.placed[0]
        if placed is None:
            placed = self._in_context.held[0]
        if placed is None and self.lasting is not None:
            placed = Placed(self.lasting)
        if torch.compiler.is_compiling():
            return placed
        if is_in_backward():
            return self._recomputed(placed, is_strict)
        if placed is not None or self._was_used:
            self._was_used = True
            for checkpoint in self._checkpoints_inside():
                checkpoint.__dict__[_remembered(self)] = placed
        return placed

    def _recomputed(self, placed: Placed | None, is_strict: bool) -> Placed | None:
        name = _remembered(self)
        checkpoints = list(self._checkpoints_inside())
        for at, checkpoint in enumerate(checkpoints):
            if name in checkpoint.__dict__:
                placed = checkpoint.__dict__[name]
                checkpoints = checkpoints[:at]
                break
        else:
            if checkpoints and not self._around():
                return None  # nobody had used places when they ran first
            if is_strict and placed is None and self._was_used:
                raise PatchError(
                    "a model with places is run again in a backward pass, after the places were "
                    "left, by code that is not torch.utils.checkpoint: call backward() inside of "
                    "`with places(...)`, or use torch.utils.checkpoint"
                )
        for inner in checkpoints:
            inner.__dict__[name] = placed
        return placed

    def _checkpoints_inside(self) -> Iterator[Any]:
        """The checkpoints that began after the places were entered, the innermost first.

        Those further out run the entering again, too.
        """
        around = self._around()
        for checkpoint in checkpoints_around():
            if any(checkpoint is each for each in around):
                return
            yield checkpoint

    def _around(self) -> tuple[Any, ...]:
        """The checkpoints in which the places were entered that hold now."""
        if self._in_forward.placed[0] is None and self._in_context.is_set:
            around: tuple[Any, ...] = self._in_context.held[1]
            return around
        return self._in_forward.around[0]

    def enter(self, placed: Placed | None) -> tuple[Any, ...]:
        """Let places hold in this thread, within a forward pass; gives the :meth:`state` before."""
        before = self.state()
        self._in_forward.placed[0] = placed
        if not torch.compiler.is_compiling():
            self._in_forward.around[0] = tuple(checkpoints_around())
        return before

    def state(self) -> tuple[Any, ...]:
        """What this thread's forward pass entered last, and did not leave: for :meth:`restore`."""
        return self._in_forward.placed[0], self._in_forward.around[0]

    def restore(self, state: tuple[Any, ...]) -> None:
        """Let those places hold again in this thread that did at a :meth:`state`."""
        self._in_forward.placed[0], self._in_forward.around[0] = state

    @contextmanager
    def during(self, placed: Placed) -> Iterator[None]:
        """While entered, places hold in this task, or in this thread outside of tasks.

        May be left in another order than entered, and in another task: generators are.
        """
        thread, in_forward = threading.get_ident(), self.state()
        self.restore((None, ()))  # these are the innermost
        outer, mark = self._held_in_context(), _Mark()
        own = [placed, tuple(checkpoints_around()), mark, outer]
        token = self._in_context.set(own)
        try:
            yield
        finally:
            others = _without(mark, self._held_in_context())
            if self._in_context.is_of_this_context(token):
                self._in_context.set(others)
            else:  # the one where it was entered, which nobody can change from here
                mark.was_left_elsewhere = True
                own[:2] = (None, ()) if outer is None else outer[:2]
            if threading.get_ident() == thread:
                self.restore(in_forward)

    def _held_in_context(self) -> list[Any] | None:
        held: list[Any] = self._in_context.held
        return held if self._in_context.is_set else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Places:
        return Places(copy.deepcopy(self.lasting, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Places, (self.lasting,)


_sharing = fork_safe(threading.Lock())


def shared_places(layers: Iterable[nn.Module]) -> list[Places]:
    """What the layers of a model ask, each once; layers that have nothing to ask get one."""
    with _sharing:
        shared: dict[int, Places] = {}
        new = Places()
        for layer in layers:
            # Not an attribute that tells how the layer pads, which setattr would look into.
            places = layer.__dict__.setdefault("_places", new)
            shared[id(places)] = places
        return list(shared.values())


@contextmanager
def entered(places: Iterable[Places], theta: Tensor) -> Iterator[None]:
    """While entered, these places hold in this task or thread, and afterwards those from before."""
    with _entered([(each, Placed(theta, maps=_maps_of(each), memo=GridMemo())) for each in places]):
        yield


@contextmanager
def maps_entered(
    places: Iterable[Places], maps: Mapping[str, Tensor], *, only_missing: bool = False
) -> Iterator[None]:
    """While entered, layers see these maps too, at the places that hold.

    Args:
        places: What the layers ask.
        maps: By name, shape (N, channels, *size) or (1, channels, *size).
        only_missing: Whether maps that hold already win.
    """
    ndim = next(iter(maps.values())).dim() - 2 if maps else 2
    pairs = []
    for each in places:
        held = each.held() or Placed(torch.eye(ndim, ndim + 1).unsqueeze(0))
        both = {**maps, **held.maps} if only_missing else {**held.maps, **maps}
        pairs.append((each, held._replace(maps=both, memo=GridMemo())))
    with _entered(pairs):
        yield


@contextmanager
def _entered(pairs: Iterable[tuple[Places, Placed]]) -> Iterator[None]:
    if not torch.compiler.is_compiling():
        with ExitStack() as stack:
            for each, placed in pairs:
                stack.enter_context(each.during(placed))
            yield
        return
    # Code that is compiled or exported cannot set the variables of a context, and is never
    # suspended in the middle.
    before = [(each, each.enter(placed)) for each, placed in pairs]
    try:
        yield
    finally:
        for each, held in before:
            each.restore(held)


def _without(mark: _Mark, held: list[Any] | None) -> list[Any] | None:
    """What a context keeps when one of the places that it has is left."""
    if held is None:
        return None
    outer = _without(mark, held[3])
    if held[2] is mark or held[2].was_left_elsewhere:
        return outer
    return held if outer is held[3] else [*held[:3], outer]


def _maps_of(places: Places) -> Mapping[str, Tensor]:
    held = places.held()
    return {} if held is None else held.maps


def _remembered(places: Places) -> str:
    """The name under which a checkpoint remembers the places of its first run."""
    return f"_coordconv_places_{id(places)}"
