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
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import CONV_SIGNATURES, call_geometry
from coordconv_patch.graphs.own_padding import OwnPadding, pad_arguments, unpadded
from coordconv_patch.layers.branch import CoordBranch
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
        terms: The geometry in the terms of a call, see :func:`_terms_of`. One tuple, since code
            that torch.compile made looks at every value again before it runs.
    """

    name: str
    owned: OwnedCalls
    geometry: ConvGeometry
    branch: str
    counts: bool = field(init=False)
    terms: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", self.owned.indices is not None)
        object.__setattr__(self, "terms", _terms_of(self.geometry, self.owned.padding))

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
        self.owned = [(site, _stored_weight(owner, site)) for site in owned]
        self.seen = [0] * len(owned)
        self.strays: list[tuple[Any, Any]] = []
        self.sees_padding = any(site.owned.padding.amounts for site in owned)
        self.padded: deque[tuple[Any, dict[str, Any]]] = deque(maxlen=_MOST_PADS)
        self.trains = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        output = func(*args, **kwargs)
        if func in _FUNCTIONS:
            arguments = dict(zip(CONV_SIGNATURES[func], args, strict=False)) | kwargs
            return self._with_branches(func, arguments, output)
        if self.sees_padding and func is F.pad:
            self.padded.append((output, pad_arguments(func, args, kwargs)))
        return output

    def _with_branches(self, func: Any, arguments: dict[str, Any], output: Any) -> Any:
        weight = arguments["weight"]
        is_stray = not _is_stored(weight)
        for index, (site, stored) in enumerate(self.owned):
            if func is not CONV_FUNCTIONS[site.terms[:2]]:
                continue
            if weight is not stored if stored is not None else _is_stored(weight):
                continue
            is_stray = False
            position = self.seen[index]
            self.seen[index] += 1
            indices = site.owned.indices
            if indices is None or position in indices:
                output = self._with_branch(site, func, arguments, output)
        if is_stray:
            self.strays.append((func, None if isinstance(weight, fx.Proxy) else weight.shape))
        return output

    def _with_branch(
        self, site: OwnedSite, func: Any, arguments: dict[str, Any], output: Any
    ) -> Any:
        self._check_not_in_a_checkpoint(site)
        given, own = self._input(site, arguments)
        branch = self._branch(site)
        if isinstance(given, fx.Proxy):  # somebody traces
            return output + branch(given)
        if not _is_call_of(site.terms, arguments):
            found = call_geometry(func, arguments, arguments["weight"].shape, None, own)
            raise PatchError(
                f"{site.name} has coordinates for a convolution {site.geometry}, but its code "
                f"now calls one that is {found}. Unpatch the model, and patch it anew with "
                "example inputs that run this way"
            )
        if output.layout is not torch.strided:  # MKLDNN tensors know no sum with a map
            return (output.to_dense() + branch(given.to_dense())).to_mkldnn()
        added = branch(given)
        if added.dtype is not output.dtype:
            added = added.to(output.dtype)
        # In place, for nobody holds the output yet: it saves a copy of the activations.
        is_own = type(branch._parameters.get("coord_weight")) is nn.Parameter
        if not is_own or torch.compiler.is_compiling() or is_transforming():
            return output + added
        return output.add_(added)

    def _branch(self, site: OwnedSite) -> CoordBranch:
        if "." in site.branch:
            return cast(CoordBranch, self.owner.get_submodule(site.branch))
        return cast(CoordBranch, self.owner._modules[site.branch])  # quicker, compiled too

    def _input(self, site: OwnedSite, arguments: dict[str, Any]) -> tuple[Any, OwnPadding]:
        """The convolution's input, before the code padded it where the site says that it does."""
        given, expected = arguments["input"], site.owned.padding
        if not expected.amounts:
            return given, expected
        if torch.compiler.is_compiling():  # which does not show F.pad to modes
            return _without_border(given, expected.amounts), expected
        geometry = site.geometry
        inner, own = unpadded(arguments, geometry.ndim, geometry.kernel_size, self._pad_behind)
        if own == expected:
            return inner, expected
        raise PatchError(
            f"{site.name} pads its input by itself, by other pixels than when the model was "
            f"patched ({expected.amounts}), so its coordinates cannot follow: unpatch the model, "
            "and patch it anew with example inputs that run this way"
        )

    def _pad_behind(self, value: Any) -> dict[str, Any] | None:
        return next((pad for output, pad in self.padded if output is value), None)

    def check(self) -> None:
        """Check, after a method of the owner, that no call of a site can have been missed.

        Raises:
            PatchError: If calls were counted, and are not as many as when the model was
                patched, or a call by a computed weight may be one of a site whose stored
                weight was not used itself.
        """
        for (site, stored), seen in zip(self.owned, self.seen, strict=True):
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
            func is site.function and (shape is None or other is None or other == shape)
            for func, other in self.strays
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


_FUNCTIONS = frozenset(CONV_FUNCTIONS.values())
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
    ndim = terms[0]
    return terms[2:] == (
        arguments.get("groups", 1),
        tuple(arguments["weight"].shape),
        _spread(arguments.get("stride", 1), ndim),
        _spread(arguments.get("dilation", 1), ndim),
        _spread(arguments.get("output_padding", 0), ndim),
        _padding_of(arguments.get("padding", 0), ndim),
    )


def _without_border(padded: Tensor, amounts: Sequence[tuple[int, int]]) -> Tensor:
    """A view of a padded image without what was added ``(before, after)`` each dimension."""
    for dim, (before, after) in enumerate(amounts, start=-len(amounts)):
        padded = padded.narrow(dim, before, padded.shape[dim] - before - after)
    return padded


def _padding_of(value: Any, ndim: int) -> Any:
    return value if isinstance(value, str) else _spread(value, ndim)


def _spread(value: Any, ndim: int) -> tuple[int, ...]:
    """An argument that may be one number for all dimensions, as one for each."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * ndim if len(numbers) == 1 else numbers


_CHECKPOINTS = frozenset({checkpoint.__code__, CheckpointFunction.forward.__code__})


def _place(site: OwnedSite) -> str:
    return site.owned.owner or "the model"


def _stored_weight(owner: nn.Module, site: OwnedSite) -> Any:
    """The weight by which the calls are known; ``None`` where they are known by position."""
    name = site.owned.weight
    if name is None:
        return None
    return operator.attrgetter(name)(owner)


def _is_stored(weight: Any) -> bool:
    """Whether a weight is a parameter, not computed."""
    if isinstance(weight, fx.Proxy):
        return weight.node.op == "get_attr"
    return isinstance(weight, nn.Parameter)
