"""The torch function mode that adds branches to the convolution calls of a module's own code.

While it is entered, every function runs as it is, and the output of the calls that belong to a
site gets the branch added. All state of a running forward is in its mode object, so threads do
not meet.
"""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import CONV_SIGNATURES, call_geometry
from coordconv_patch.graphs.own_padding import OwnPadding, pad_arguments, unpadded
from coordconv_patch.layers.capture import is_transforming
from coordconv_patch.layers.geometry import CONV_FUNCTIONS, ConvGeometry
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
    """

    def __init__(self, owner: nn.Module, owned: Sequence[OwnedSite], counts: bool) -> None:
        super().__init__()
        self.owner = owner
        self.counts = counts
        self.owned = [(site, site.key) for site in owned]
        # By attrgetter: a name may have dots, or be that of a parametrization.
        names = [key[0] for _, key in self.owned]
        self.stored = [None if name is None else operator.attrgetter(name)(owner) for name in names]
        self.seen = [0] * len(owned)
        self.strays: list[tuple[Any, Any]] = []
        self.in_dynamo = torch.compiler.is_dynamo_compiling()  # which does not show F.pad to modes
        self.trains = not self.in_dynamo and torch.is_grad_enabled()
        self.padded: deque[tuple[Any, dict[str, Any]]] | None = None
        if not self.in_dynamo and any(key[3] for _, key in self.owned):
            self.padded = deque(maxlen=_MOST_PADS)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        output = func(*args, **kwargs)
        if func in _NAMES:
            return self._with_branches(_NAMES[func], args, kwargs, output)
        if self.padded is not None and func is F.pad:
            self.padded.append((output, pad_arguments(func, args, kwargs)))
        return output

    def _with_branches(self, name: str, args: Any, kwargs: Any, output: Any) -> Any:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        is_known = False
        for index, (site, key) in enumerate(self.owned):
            stored, (_, _, indices, _, _, function, names) = self.stored[index], key
            if name != function:
                continue
            if weight is not stored if stored is not None else _is_stored(weight):
                continue
            is_known = True
            position = self.seen[index]
            self.seen[index] += 1
            if indices is None or position in indices:
                # Of equal lengths: torch.compile of torch 2.6 refuses others in spite of strict.
                arguments = dict(zip(names[: len(args)], args, strict=True))
                for argument in kwargs:  # code that torch.compile made checks more for a union
                    arguments[argument] = kwargs[argument]
                output = self._with_branch(site, key, arguments, output)
        if not is_known and not _is_stored(weight):
            self.strays.append((name, None if isinstance(weight, fx.Proxy) else weight.shape))
        return output

    def _with_branch(
        self, site: OwnedSite, key: tuple[Any, ...], arguments: dict[str, Any], output: Any
    ) -> Any:
        _, branch_name, _, amounts, terms, *_ = key
        if not self.in_dynamo:
            self._check_not_in_a_checkpoint(site)
        given = self._input(site, amounts, arguments)
        branch = self._branch(branch_name)
        if not self.in_dynamo and isinstance(given, fx.Proxy):  # somebody traces
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
        if self.in_dynamo or torch.compiler.is_compiling() or is_transforming():
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
        return next((pad for output, pad in self.padded or () if output is value), None)

    def check(self) -> None:
        """Check, after a method of the owner, that no call of a site can have been missed.

        Raises:
            PatchError: If calls were counted, and are not as many as when the model was
                patched, or a call by a computed weight may be one of a site whose stored
                weight was not used itself.
        """
        for (site, _), stored, seen in zip(self.owned, self.stored, self.seen, strict=True):
            if stored is not None and not seen and self._has_stray_like(site, stored):
                raise PatchError(
                    f"{site.name} is known by its stored weight, but {_place(site)} now calls "
                    f"{site.owned.function} with one that it computes (another dtype, or a "
                    "parametrization that was added since): unpatch the model, and patch it anew "
                    "with example inputs that run this way"
                )
            if self.counts and seen not in (0, site.owned.total):
                raise PatchError(
                    f"{site.name} is told from other convolutions by its position among "
                    f"{site.owned.total} calls of {site.owned.function} in {_place(site)}, "
                    f"which now made {seen}: patch the model anew with example inputs that run "
                    "this way, or store the weight as a Parameter of its own"
                )

    def _has_stray_like(self, site: OwnedSite, stored: Any) -> bool:
        shape = None if isinstance(stored, fx.Proxy) else stored.shape
        return any(
            name == site.owned.function and (shape is None or other is None or other == shape)
            for name, other in self.strays
        )

    def _check_not_in_a_checkpoint(self, site: OwnedSite) -> None:
        """Refuse a checkpoint around code that would run again without the mode.

        A checkpointed *method* of the owner enters the mode when it runs again; a function
        inside of a method does not, and its gradients would be wrong without a word.
        """
        if not self.trains or torch.compiler.is_compiling():
            return
        frame: FrameType | None = sys._getframe(1)
        checkpointed = False
        while frame is not None and frame.f_code not in ENTERED_CODE:
            checkpointed |= frame.f_code in _CHECKPOINTS
            frame = frame.f_back
        if checkpointed:
            raise PatchError(
                f"{site.name}: gradient checkpointing of a function inside {_place(site)} runs "
                "it again without its coordinates: checkpoint the module, or one of its methods"
            )


_NAMES = {function: function.__name__ for function in CONV_FUNCTIONS.values()}
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
        if not isinstance(value, str):  # it may be one number for all dimensions
            numbers = (value,) if isinstance(value, int) else tuple(value)
            value = numbers * ndim if len(numbers) == 1 else numbers
        if value != wanted:
            return False
    return True


def _without_border(padded: Tensor, amounts: Sequence[tuple[int, int]]) -> Tensor:
    """A view of a padded image without what was added ``(before, after)`` each dimension."""
    for dim, (before, after) in enumerate(amounts, start=-len(amounts)):
        padded = padded.narrow(dim, before, padded.shape[dim] - before - after)
    return padded


_CHECKPOINTS = frozenset({checkpoint.__code__, CheckpointFunction.forward.__code__})


def _place(site: OwnedSite) -> str:
    return site.owned.owner or "the model"


def _is_stored(weight: Any) -> bool:
    """Whether a weight is a parameter, not computed."""
    if isinstance(weight, fx.Proxy):
        return weight.node.op == "get_attr"
    return isinstance(weight, nn.Parameter)
