"""The torch function mode that adds branches to the convolution calls of a module's own code.

While it is entered, every function runs as it is, and the output of the calls that belong to a
site gets the branch added. All state of a running forward is in its mode object, so threads do
not meet.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import CALLED_CONVS, CONV_SIGNATURES, call_geometry
from coordconv_patch.graphs.own_padding import OwnPadding, pad_arguments, unpadded
from coordconv_patch.layers.capture import is_transforming
from coordconv_patch.layers.geometry import CONV_FUNCTIONS, ConvGeometry
from coordconv_patch.owners.callers import (
    is_for_its_own_weight,
    is_in_another_graph,
    runs_again,
)
from coordconv_patch.owners.owned_calls import OwnedCalls

__all__ = ["ENTERED_CODE", "BranchMode", "OwnedSite"]

ENTERED_CODE: set[Any] = set()
"""Code of the functions that enter the mode, to know their frames by."""


@dataclass(frozen=True)
class OwnedSite:
    """What an owner's mode looks for: the calls of one site, and the branch to add to them.

    Attributes:
        name: The site's name.
        owned: Which calls.
        geometry: Their geometry.
        branch: Name of the branch relative to the owner.
        counts: Whether the calls are told by their position.
        key: What each call is compared with: the names of weight and branch, the positions, the
            pixels that the code pads, the geometry (see :func:`_terms_of`), the function's name
            and those of its arguments. One tuple, because code that torch.compile made checks
            every value again before it runs.
    """

    name: str
    owned: OwnedCalls
    geometry: ConvGeometry
    branch: str
    counts: bool = field(init=False)
    key: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", self.owned.indices is not None)
        owned = self.owned
        terms, names = _terms_of(self.geometry, owned.padding), CONV_SIGNATURES[self.function]
        seen = (owned.weight, self.branch, owned.indices, owned.padding.amounts)
        object.__setattr__(self, "key", (*seen, terms, self.function.__name__, names))

    @property
    def function(self) -> Callable[..., Tensor]:
        return CONV_FUNCTIONS[self.geometry.ndim, self.geometry.transposed]


class BranchMode(TorchFunctionMode):
    """While entered, adds branches to the convolution calls of an owner's sites.

    Args:
        owner: The owner.
        owned: What to look for.
        counts: Whether the calls looked for are counted.
        method: Name of the method that runs without a forward, where nothing can be counted;
            empty where it can.
    """

    def __init__(
        self, owner: nn.Module, owned: Sequence[OwnedSite], counts: bool, method: str = ""
    ) -> None:
        super().__init__()
        self.owner = owner
        self.counts = counts
        self.method = method
        self.owned = [(site, site.key) for site in owned]
        # By attrgetter: a name may have dots, or be that of a parametrization.
        names = [key[0] for _, key in self.owned]
        self.stored = [None if name is None else operator.attrgetter(name)(owner) for name in names]
        self.seen = [0] * len(owned)
        self.strays: list[tuple[Any, Any]] = []
        self.stored_strays: list[tuple[Any, Any]] = []
        self.trains = torch.is_grad_enabled()
        self.pads = any(key[3] for _, key in self.owned)
        self.padded: list[tuple[Any, dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        in_dynamo = torch.compiler.is_dynamo_compiling()  # a part of an eager forward may be
        if in_dynamo and func is checkpoint:
            # What runs in there it would trace without this mode, and say nothing.
            torch._dynamo.graph_break()
        output = func(*args, **kwargs)
        if func in _NAMES:
            if not in_dynamo and is_in_another_graph(sys._getframe(1), self.owner):
                return output  # the graph has the branch, traced under this mode
            return self._with_branches(_NAMES[func], args, kwargs, output)
        # Dynamo does not show F.pad to modes.
        if self.pads and not in_dynamo and func is F.pad:
            self.padded.append((output, pad_arguments(func, args, kwargs)))
            del self.padded[:-_MOST_PADS]
        return output

    def _with_branches(self, name: str, args: Any, kwargs: Any, output: Any) -> Any:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        is_known, computed = False, None
        for index, (site, key) in enumerate(self.owned):
            stored, (_, _, indices, _, _, function, names) = self.stored[index], key
            if name != function:
                continue
            if stored is None:
                computed = self._is_computed(weight) if computed is None else computed
            if weight is not stored if stored is not None else not computed:
                continue
            is_known = True
            position = self.seen[index]
            self.seen[index] += 1
            if self.method or indices is None or position in indices:
                # Of equal lengths: torch.compile of torch 2.6 refuses others in spite of strict.
                arguments = dict(zip(names[: len(args)], args, strict=True))
                for argument in kwargs:  # code that torch.compile made checks more for a union
                    arguments[argument] = kwargs[argument]
                output = self._with_branch(site, key, arguments, output)
        if not is_known:
            self._note_stray(name, weight)
        return output

    def _is_computed(self, weight: Any) -> bool:
        """Whether a weight is computed: not a Parameter, nor what a module keeps as its own."""
        if _is_stored(weight) or any(weight is stored for stored in self.stored):
            return False
        if isinstance(weight, fx.Proxy) or torch.compiler.is_dynamo_compiling():
            return True
        # Called through __torch_function__ and _with_branches.
        return not is_for_its_own_weight(sys._getframe(3), weight)

    def _note_stray(self, name: str, weight: Any) -> None:
        """Remember a call that may be one of a site's, by a weight of another kind than then."""
        shape = None if isinstance(weight, fx.Proxy) else weight.shape
        if _is_stored(weight):
            if self.counts and any(weight is own for own in self.owner._parameters.values()):
                self.stored_strays.append((name, shape))
        else:
            self.strays.append((name, shape))

    def _with_branch(
        self, site: OwnedSite, key: tuple[Any, ...], arguments: dict[str, Any], output: Any
    ) -> Any:
        if self.method:
            raise PatchError(
                f"{site.name} is told from other convolutions by its position in one forward pass "
                f"of {_place(site)}, and {self.method}() was called without one: call the module "
                "itself, or store the weight as a Parameter of its own"
            )
        _, branch_name, _, amounts, terms, *_ = key
        in_dynamo = torch.compiler.is_dynamo_compiling()
        if not in_dynamo:
            self._check_runs_once(site)
        given = self._input(site, amounts, arguments)
        branch = self._branch(branch_name)
        if not in_dynamo and isinstance(given, fx.Proxy):  # somebody traces
            return output + branch(given)
        if not _is_call_of(terms, arguments):
            shape, own = arguments["weight"].shape, site.owned.padding
            actual = call_geometry(site.function, arguments, shape, None, own)
            raise PatchError(
                f"{site.name} has coordinates for a convolution {site.geometry}, but its code "
                f"now calls one that is {actual}. Unpatch the model, and patch it anew with "
                "example inputs that run this way"
            )
        if output.layout is not torch.strided:  # MKLDNN tensors know no sum with a map
            return (output.to_dense() + branch(given.to_dense())).to_mkldnn()
        added = branch(given)
        if added.dtype is not output.dtype:
            added = added.to(output.dtype)
        # In place, for nobody holds the output yet: it saves a copy of the activations.
        if in_dynamo or torch.compiler.is_compiling() or is_transforming():
            return output + added
        is_own = type(branch._parameters.get("coord_weight")) is nn.Parameter
        return output.add_(added) if is_own else output + added

    def _branch(self, name: str) -> Any:
        if "." in name:
            return self.owner.get_submodule(name)
        return self.owner._modules[name]  # quicker, compiled too

    def _input(self, site: OwnedSite, amounts: Any, arguments: dict[str, Any]) -> Any:
        """The convolution's input, before the code padded it where the site says that it does."""
        given = arguments["input"]
        if not amounts:
            return given
        if torch.compiler.is_compiling():
            return _without_border(given, amounts)
        geometry = site.geometry
        inner, own = unpadded(arguments, geometry.ndim, geometry.kernel_size, self._pad_behind)
        if own == site.owned.padding:
            return inner
        raise PatchError(
            f"{site.name} pads its input by itself, by other pixels than when the model was "
            f"patched ({amounts}), so its coordinates cannot follow: unpatch the model, "
            "and patch it anew with example inputs that run this way"
        )

    def _pad_behind(self, value: Any) -> dict[str, Any] | None:
        return next((pad for output, pad in self.padded if output is value), None)

    def check(self) -> None:
        """Check, after a method of the owner, that no call of a site can have been missed.

        Raises:
            PatchError: If calls were counted, and are not as many as when the model was
                patched; or if a site that was not used may have been called by a weight of
                another kind: computed now where it was stored, or the other way round.
        """
        if self.method:
            return
        for (site, _), stored, seen in zip(self.owned, self.stored, self.seen, strict=True):
            if not seen and self._has_stray_like(site, stored):
                known, other = _WEIGHT_WAS_STORED if stored is not None else _WEIGHT_WAS_COMPUTED
                raise PatchError(
                    f"{site.name} is known by {known}, but {_place(site)} now calls "
                    f"{site.owned.function} with one that {other}: unpatch the model, and patch "
                    "it anew with example inputs that run this way"
                )
            if self.counts and seen not in (0, site.owned.total):
                raise PatchError(
                    f"{site.name} is told from other convolutions by its position among "
                    f"{site.owned.total} calls of {site.owned.function} in {_place(site)}, "
                    f"which now made {seen}: patch the model anew with example inputs that run "
                    "this way, or store the weight as a Parameter of its own"
                )

    def _has_stray_like(self, site: OwnedSite, stored: Any) -> bool:
        shape: Any = site.geometry.weight_shape
        strays = self.stored_strays
        if stored is not None:
            shape, strays = None if isinstance(stored, fx.Proxy) else stored.shape, self.strays
        return any(
            name == site.owned.function and (shape is None or other is None or other == shape)
            for name, other in strays
        )

    def _check_runs_once(self, site: OwnedSite) -> None:
        """Refuse code that would run again without the mode, to compute gradients.

        A checkpointed *method* of the owner enters the mode when it runs again, unless calls are
        counted; a function inside of a method does not, and its gradients would be wrong
        without a word.
        """
        if not self.trains or torch.compiler.is_compiling():
            return
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not self._is_entered_by(frame):
            if how := runs_again(frame.f_code):
                raise PatchError(
                    f"{site.name}: {how} inside {_place(site)} runs it again without its "
                    "coordinates: checkpoint the module"
                    f"{'' if self.counts else ', or one of its methods'}"
                )
            frame = frame.f_back

    def _is_entered_by(self, frame: FrameType) -> bool:
        """Whether what runs in a frame would enter the mode anew if it ran again."""
        if frame.f_code not in ENTERED_CODE:
            return False
        found = frame.f_locals
        return self in found["modes"] if self.counts else found["owner"] is self.owner


_NAMES = {called: function.__name__ for called, function in CALLED_CONVS.items()}
_WEIGHT_WAS_STORED = (
    "its stored weight",
    "it computes (another dtype, or a parametrization that was added since)",
)
_WEIGHT_WAS_COMPUTED = (
    "its position among calls with computed weights",
    "it stores (a parametrization was removed, or another dtype)",
)
"""How a site is known, and what it would be called with if that no longer holds."""
_MOST_PADS = 8
"""Pads that are remembered until their convolution comes; each keeps its output alive."""


def _terms_of(geometry: ConvGeometry, own: OwnPadding) -> tuple[Any, ...]:
    """What calls of a geometry have in common, for :func:`_is_call_of`."""
    ndim = geometry.ndim
    return (
        ndim,
        geometry.transposed,
        geometry.groups,
        geometry.weight_shape,
        geometry.stride,
        geometry.dilation,
        geometry.output_padding if geometry.transposed else (0,) * ndim,
        geometry.padding if own.declared is None else (0,) * ndim,
    )


def _is_call_of(terms: tuple[Any, ...], arguments: Mapping[str, Any]) -> bool:
    """Whether a call has a geometry; in terms that torch.compile can follow, and quick."""
    ndim, _, groups, weight_shape, *expected = terms
    if arguments.get("groups", 1) != groups or tuple(arguments["weight"].shape) != weight_shape:
        return False
    stride, dilation = arguments.get("stride", 1), arguments.get("dilation", 1)
    given = (stride, dilation, arguments.get("output_padding", 0), arguments.get("padding", 0))
    for value, wanted in zip(given, expected, strict=True):
        if not isinstance(value, str):  # it may be one number for all dimensions, numpy's too
            numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            value = numbers * ndim if len(numbers) == 1 else numbers
        if value != wanted:
            return False
    return True


def _without_border(padded: Tensor, amounts: Sequence[tuple[int, int]]) -> Tensor:
    """A view of a padded image without what was added ``(before, after)`` each dimension."""
    for dim, (before, after) in enumerate(amounts, start=-len(amounts)):
        padded = padded.narrow(dim, before, padded.shape[dim] - before - after)
    return padded


def _place(site: OwnedSite) -> str:
    return site.owned.owner or "the model"


def _is_stored(weight: Any) -> bool:
    """Whether a weight is a parameter, not computed."""
    if isinstance(weight, fx.Proxy):
        return weight.node.op == "get_attr"
    return isinstance(weight, nn.Parameter)
