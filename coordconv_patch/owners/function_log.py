"""What convolution functions a forward pass calls, in whose code, and by which weights.

The log is kept by :mod:`coordconv_patch.sites.run_record`, which sees every torch function of a
running model and knows which modules are running. It finds the sites of modules
that call ``F.conv2d`` themselves, whether or not torch.fx can trace them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import (
    CALLED_CONVS,
    CONV_SIGNATURES,
    call_geometry,
    join_names,
    weight_site_name,
)
from coordconv_patch.graphs.own_padding import NOT_PADDED, OwnPadding, pad_arguments, unpadded
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.geometry import ConvGeometry
from coordconv_patch.owners.callers import stores_weight
from coordconv_patch.owners.owned_calls import OwnedCalls

__all__ = ["FunctionLog", "FunctionSite", "common_caller"]

_MOST_PADS = 8
"""Pads that are remembered until a convolution comes; each keeps its output alive."""

Running = Sequence[tuple[str, int]]
"""The modules that are running, outermost first: their names, and the numbers of their runs."""


@dataclass(frozen=True)
class FunctionSite:
    """A functional site of a plain module, as a forward pass showed it.

    Attributes:
        name: Its name.
        owned: Which calls they are.
        geometry: Their geometry; ``None`` where they have several.
        obstacle: Why the site cannot be patched; empty if it can.
        weights: The weight, or those of its calls where it is computed anew; alive, so that no
            other tensor has the identity of one.
    """

    name: str
    owned: OwnedCalls
    geometry: ConvGeometry | None
    obstacle: str
    weights: tuple[Tensor, ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class _Event:
    """A call of a convolution function, by any module."""

    function: Any
    weight: Tensor
    running: tuple[tuple[str, int], ...]
    is_own: bool
    """Whether the innermost running module is not a convolution, so that its own code calls."""
    is_stored: bool
    """Whether the weight is a Parameter, or what a convolution module calls with as its own."""
    weight_is_constant: bool
    """Whether the weight does not depend on the model's input."""
    input_is_constant: bool
    """Whether the convolution's input does not either."""
    geometry: ConvGeometry | None
    padding: OwnPadding
    obstacle: str


class FunctionLog:
    """Collects the calls of convolution functions during one forward pass.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(id(tensor), name)
        self._events: list[_Event] = []
        self._padded: deque[tuple[Tensor, dict[str, Any], str]] = deque(maxlen=_MOST_PADS)
        self._constants = _Constants(model)

    def note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        running: Running,
        *,
        in_graph: bool,
    ) -> tuple[Tensor, Tensor] | None:
        """Look at one torch function that the model called.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned.
            running: The modules that are running.
            in_graph: Whether a GraphModule called it, whose graph tells its sites.

        Returns:
            Of a convolution in a plain module's own code: its weight, and its input.
        """
        own = None
        if running and (function := CALLED_CONVS.get(func)) is not None:
            own = self._note_convolution(function, args, kwargs, running, in_graph)
        elif func is F.pad and running:
            self._padded.append((output, pad_arguments(func, args, kwargs), running[-1][0]))
        self._constants.note(func, args, kwargs, output)
        return own

    def _note_convolution(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        running: Running,
        in_graph: bool,
    ) -> tuple[Tensor, Tensor] | None:
        arguments = dict(zip(CONV_SIGNATURES[func], args, strict=False)) | dict(kwargs)
        caller = self._model.get_submodule(running[-1][0])
        if isinstance(caller, CoordBranch):
            return None
        weight = arguments["weight"]
        given, padding, geometry, obstacle = arguments["input"], NOT_PADDED, None, ""
        try:
            given, padding = self._input(arguments, running[-1][0])
            geometry = call_geometry(func, arguments, weight.shape, weight.dtype, padding)
        except PatchError as error:
            obstacle = str(error)
        is_own = not (in_graph or isinstance(caller, (_ConvNd, fx.GraphModule)))
        self._events.append(
            _Event(
                func,
                weight,
                tuple(running),
                is_own,
                isinstance(weight, nn.Parameter)
                or (isinstance(caller, _ConvNd) and stores_weight(caller, weight)),
                weight in self._constants,
                arguments["input"] in self._constants,
                geometry,
                padding,
                obstacle,
            )
        )
        return (weight, given) if is_own else None

    def _input(self, arguments: Mapping[str, Any], caller: str) -> tuple[Tensor, OwnPadding]:
        """A convolution's input before its caller, or a part of that, pads it."""

        def pad_behind(value: Any) -> dict[str, Any] | None:
            for output, pad, padded_by in self._padded:
                is_own = padded_by == caller or (caller and padded_by.startswith(f"{caller}."))
                if output is value and is_own:
                    return pad
            return None

        size = arguments["weight"].shape[2:]
        return unpadded(arguments, len(size), size, pad_behind)

    def sites(self) -> Iterator[FunctionSite]:
        """The functional sites of plain modules, in order of their first calls."""
        taken: dict[str, int] = {}
        for events in self._events_by_site():
            site = self._site(events)
            count = taken[site.name] = taken.get(site.name, -1) + 1
            yield replace(site, name=f"{site.name}_{count}") if count else site

    def _events_by_site(self) -> Iterator[list[_Event]]:
        """Calls by one weight; and by weights that each run of a module computes anew."""
        by_weight: dict[int, list[_Event]] = {}
        for event in self._events:
            if event.is_own:
                by_weight.setdefault(id(event.weight), []).append(event)
        by_place: dict[Any, list[_Event]] = {}
        for weight, events in by_weight.items():
            is_stored = weight in self._names or isinstance(events[0].weight, nn.Parameter)
            place = None if is_stored else self._place_in_a_run(events)
            by_place.setdefault(weight if place is None else place, []).extend(events)
        yield from by_place.values()

    def _place_in_a_run(self, events: Sequence[_Event]) -> tuple[Any, ...] | None:
        """Where calls by one computed weight are in the run of their owner, if it is one run."""
        owner = common_caller([[name for name, _ in event.running] for event in events])
        if len({dict(event.running).get(owner) for event in events}) > 1:
            return None
        try:
            return owner, events[0].function, self._positions(events, owner, False)
        except PatchError:
            return None

    def _site(self, events: Sequence[_Event]) -> FunctionSite:
        first = events[0]
        function = first.function.__name__
        stored = self._names.get(id(first.weight))
        stacks = [[name for name, _ in event.running] for event in events]
        if stored is None:
            owner = common_caller(stacks)
            name = join_names(owner, function)
        else:
            holder = stored.rpartition(".")[0]
            owner = common_caller(stacks, holder)
            name = weight_site_name(stored, self._model.get_submodule(holder))
        obstacle = next((event.obstacle for event in events if event.obstacle), "")
        if stored is None and isinstance(first.weight, nn.Parameter):
            obstacle = obstacle or (
                "its weight is a Parameter that the model does not register (it is kept in a list, "
                "perhaps), so there is no place for that of its coordinates"
            )
        geometries = {(event.geometry, event.padding) for event in events}
        if len(geometries) > 1:
            obstacle = obstacle or "one weight is used with several strides or paddings"
        if not all(event.weight_is_constant for event in events):
            obstacle = obstacle or (
                "its weight is computed from the model's input (per sample, perhaps), so there is "
                "no one weight that coordinates could be added to"
            )
        elif all(event.input_is_constant for event in events):
            obstacle = obstacle or (
                "its input does not depend on the model's input (it merges kernels, perhaps)"
            )
        counted: tuple[tuple[int, ...], int] | None = None
        if not obstacle:
            try:
                counted = self._positions(events, owner, stored is not None)
            except PatchError as error:
                obstacle = str(error)
        indices, total = (None, 0) if counted is None else counted
        own_name = None if stored is None else stored[len(owner) :].lstrip(".")
        return FunctionSite(
            name=name,
            owned=OwnedCalls(owner, function, own_name, first.padding, indices, total),
            geometry=first.geometry if len(geometries) == 1 else None,
            obstacle=obstacle,
            weights=tuple({id(event.weight): event.weight for event in events}.values()),
        )

    def _positions(
        self, events: Sequence[_Event], owner: str, by_weight: bool
    ) -> tuple[tuple[int, ...], int] | None:
        """Where a site's calls are among those that look like them, in one run of the owner.

        Returns:
            The positions, and how many calls there are; ``None`` where every call by the
            weight belongs to the site, so that nothing needs to be counted.

        Raises:
            PatchError: If that changes from run to run.
        """
        first = events[0]
        alike = [event for event in self._events if event.function is first.function]
        if by_weight:
            alike = [event for event in alike if event.weight is first.weight]
            if all(event.is_own for event in alike):
                return None
        else:
            alike = [event for event in alike if not event.is_stored]
        own = {id(event) for event in events}
        runs: dict[int, list[bool]] = {}
        for event in alike:
            run = dict(event.running).get(owner)
            if run is not None:
                runs.setdefault(run, []).append(id(event) in own)
        patterns = {tuple(pattern) for pattern in runs.values() if any(pattern)}
        if len(patterns) > 1:
            raise PatchError(
                f"which calls of {owner or 'the model'} are its own changes from run to run: store "
                "its weight as a Parameter, or make it a torch.nn convolution module"
            )
        (pattern,) = patterns
        return tuple(i for i, is_own in enumerate(pattern) if is_own), len(pattern)


def common_caller(stacks: Sequence[Sequence[str]], holder: str | None = None) -> str:
    """The innermost module in whose call all of some calls happen, and that holds their weight.

    Args:
        stacks: For each call the qualified names of the running modules, outermost first.
        holder: Name of the module that stores the weight; ``None``: none does.
    """
    for name in reversed(stacks[0]):
        holds = holder is None or not name or holder == name or holder.startswith(f"{name}.")
        if holds and all(name in stack for stack in stacks):
            return name
    return ""


_VALUES_OF_NOTHING = frozenset(
    {
        *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor),
        *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like),
    }
)
"""Functions that ask a tensor for its shape, dtype or device, not for its values."""

_VALUES_OF_THE_FIRST = frozenset(
    {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
)
"""Functions that ask their second tensor for no more than that."""


class _Constants:
    """Which tensors do not depend on a model's input: its own, and what is computed from them.

    Every other tensor is taken for one that does, such as what comes out of an autograd
    Function, which no torch function mode sees.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}
        for module in model.modules():
            self._add([list(module._parameters.values()), list(module._buffers.values())])
            self._add([value for value in vars(module).values() if isinstance(value, Tensor)])

    def __contains__(self, tensor: Tensor) -> bool:
        reference = self._known.get(id(tensor))
        return reference is not None and reference() is tensor

    def note(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        """Note a function's outputs, if all of its inputs are known; forget them if not."""
        if func in _VALUES_OF_NOTHING:
            leaves = []
        elif func in _VALUES_OF_THE_FIRST:
            leaves = [args[0]]
        else:
            leaves = pytree.tree_leaves((args, kwargs))
        if all(leaf in self for leaf in leaves if isinstance(leaf, Tensor)):
            self._add(outputs)
            return
        written = [args[0]] if func is Tensor.__setitem__ else outputs
        for leaf in pytree.tree_leaves(written):
            if isinstance(leaf, Tensor):
                self._known.pop(id(leaf), None)

    def _add(self, values: Any) -> None:
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor):
                self._known[id(leaf)] = weakref.ref(leaf)
