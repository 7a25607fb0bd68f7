"""Coordinates for the convolution functions that a plain module calls in its own code.

A module that calls ``F.conv2d(x, self.w)`` keeps its code: a copy of somebody's forward, by a
trace say, cannot be proven equal. Its class is replaced in place by a subclass, whose methods
run under a torch function mode. The mode lets every function run as it is, and adds the branch
to the output of the calls that belong to a site::

    F.conv2d(x, W)  ->  F.conv2d(x, W) + conv(c, W_c)

A call is recognised by its weight, the very tensor that the module stores. A weight that is
computed (``self.w * self.scale``) is another tensor in every call: such calls are recognised by
their position among those of the same function with computed weights, during one forward.
Every number of a recognised call is compared with the site's, and so is the number of calls
where they are counted: what cannot be told apart raises, it is never guessed.

All state of a running forward is in its mode object, so threads do not meet.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import FrameType, FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from coordconv_patch.branch import BRANCH_NAME, ChosenCalls, CoordBranch
from coordconv_patch.coords import Coordinates, is_transforming
from coordconv_patch.errors import ArgumentError, PatchError, excerpt
from coordconv_patch.fields import choice, mapping, text, whole, wholes
from coordconv_patch.functional import CONV_SIGNATURES, call_geometry
from coordconv_patch.geometry import CONV_FUNCTIONS, ConvGeometry
from coordconv_patch.own_padding import OwnPadding, pad_arguments, unpadded
from coordconv_patch.unsupported import refuse_script

__all__ = [
    "CallOwner",
    "OwnedCalls",
    "add_to_owner_",
    "geometry_of_calls",
    "owned_calls",
    "owner_obstacle",
    "remove_from_owner_",
]


_FUNCTIONS = frozenset(CONV_FUNCTIONS.values())
_MOST_CALLS = 100_000
"""Of one function in one forward pass, in a file."""


@dataclass(frozen=True)
class OwnedCalls:
    """Which calls during a module's forward are those of one site.

    Attributes:
        owner: Qualified name of the module in whose forward the calls happen, ``""`` for the
            model itself.
        function: Name of the convolution function, such as ``"conv2d"``.
        weight: Name of the stored weight relative to the owner; ``None`` where the weight is
            computed.
        padding: How the code pads the convolution's input by an operation of its own.
        indices: Positions of the site's calls among those by the same weight, or by
            computed weights, of that function; from 0 in one forward of the owner.
            ``None``: every call by the weight.
        total: How many such calls one forward makes; 0 where they are not counted.
    """

    owner: str
    function: str
    weight: str | None
    padding: OwnPadding = field(default_factory=OwnPadding)
    indices: tuple[int, ...] | None = None
    total: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready; see :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: object) -> OwnedCalls:
        """Inverse of :meth:`to_dict`, from parsed JSON, which may hold anything.

        Raises:
            ArgumentError: If a field is missing, unknown, of another type or impossible.
        """
        names = ("owner", "function", "weight", "padding", "indices", "total")
        values = mapping(fields, "function", names)
        weight, indices = values["weight"], values["indices"]
        total = whole(values["total"], "total", high=_MOST_CALLS)
        if indices is not None:
            indices = wholes(indices, "indices", range(1, total + 1), high=max(total - 1, 0))
            if list(indices) != sorted(set(indices)):
                raise ArgumentError(f"indices must be in order, each once, not {excerpt(indices)}")
        elif total or weight is None:
            raise ArgumentError("indices must be there where calls are counted")
        return cls(
            owner=text(values["owner"], "owner"),
            function=choice(values["function"], "function", [f.__name__ for f in _FUNCTIONS]),
            weight=None if weight is None else text(weight, "weight"),
            padding=OwnPadding.from_dict(values["padding"]),
            indices=indices,
            total=total,
        )


@dataclass(frozen=True)
class _Site:
    """What an owner's mode looks for: the calls of one site, and the branch to add to them."""

    name: str
    calls: OwnedCalls
    geometry: ConvGeometry
    branch: str

    @property
    def counts(self) -> bool:
        return self.calls.indices is not None

    @property
    def function(self) -> Callable[..., Tensor]:
        return CONV_FUNCTIONS[self.geometry.ndim, self.geometry.transposed]


class CallOwner(nn.Module):
    """Mixed in before the class of a module whose own convolution calls see coordinates."""

    _plain_class: type[nn.Module]
    """The class that the module has without coordinates."""
    _coord_sites: tuple[_Site, ...] = ()
    """Empty in what somebody makes by ``type(module)(...)``: it computes as a plain module."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not passed on: a library that registers its subclasses would take this for one."""

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script calls first.

        Raises:
            PatchError: If any calls have coordinates, with what to do instead.
        """
        return refuse_script(self) if self._coord_sites else self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so it is put back on what the plain class gives.
        reduced = super().__reduce_ex__(protocol)
        if type(self) is not _OWNER_CLASSES.get(self._plain_class) or isinstance(reduced, str):
            return reduced
        make, arguments, *rest = reduced
        return _made_owner, (self._plain_class, make, _of_plain_class(self, arguments)), *rest


def _of_plain_class(owner: CallOwner, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a reduced object, with its plain class for its class at run time."""
    plain = owner._plain_class
    return tuple(plain if each is type(owner) else each for each in arguments)


def _made_owner(plain: type[nn.Module], make: Callable[..., Any], arguments: Any) -> Any:
    made = make(*arguments)
    if type(made) is plain:
        made.__class__ = _owner_class(plain)
    return made


_OWNER_CLASSES: dict[type[nn.Module], type[CallOwner]] = {}


def _owner_class(plain: type[nn.Module]) -> type[CallOwner]:
    """The class of an owner, by the class that it had; the same one every time.

    It has the plain class's name: code looks at the names of classes.
    """
    made: Any = _OWNER_CLASSES.get(plain)
    if made is None:
        methods = {name: _under_mode(plain, name) for name in _own_methods(plain)}
        own: dict[str, Any] = {
            "_plain_class": plain,
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
        }
        metaclass: Any = type(plain)
        made = metaclass(plain.__name__, (CallOwner, plain), own | methods)
    return _OWNER_CLASSES.setdefault(plain, made)  # another thread may have made one meanwhile


def _own_methods(plain: type[nn.Module]) -> list[str]:
    """Names of the methods that a class adds to nn.Module, its forward among them.

    Not the forward alone: callers may begin at another method (``vae.encode(x)``), and gradient
    checkpointing calls a method again when its forward is long over.
    """
    bases = plain.__mro__[: plain.__mro__.index(nn.Module)]
    names = {name for base in bases for name in vars(base) if not name.startswith("__")}
    methods = {name for name in names if _is_plain_method(inspect.getattr_static(plain, name))}
    return sorted(methods | {"forward"})


def _is_plain_method(value: Any) -> bool:
    if not isinstance(value, FunctionType):
        return False
    late = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return not any(runs_late(value) for runs_late in late)


def _under_mode(plain: type[nn.Module], name: str) -> Callable[..., Any]:
    is_forward = name == "forward"

    @functools.wraps(getattr(plain, name))
    def entered(self: CallOwner, *args: Any, **kwargs: Any) -> Any:
        method = getattr(plain, name)  # looked up anew: classes get other methods at run time
        modes = _modes_for(self, is_forward)
        if not modes:
            return method(self, *args, **kwargs)
        if len(modes) == 1:
            with modes[0]:
                output = method(self, *args, **kwargs)
        else:
            with modes[0], modes[1]:
                output = method(self, *args, **kwargs)
        for mode in modes:
            mode.check()
        return output

    _ENTERED.add(cast(FunctionType, entered).__code__)
    return entered


_ENTERED: set[Any] = set()
"""Code of the methods above, to know their frames by (one code object, in truth)."""


def _modes_for(owner: CallOwner, is_forward: bool) -> list[_BranchMode]:
    """The modes that are to be entered for a call of one of an owner's methods.

    Calls are counted in the forward alone. A method that runs inside of another one of the
    same owner finds its modes there already.
    """
    owned = owner._coord_sites
    kinds = {site.counts for site in owned if is_forward or not site.counts}
    for mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        if type(mode) is _BranchMode and mode.owner is owner:
            kinds.discard(mode.counts)
    return [
        _BranchMode(owner, [site for site in owned if site.counts is counts], counts)
        for counts in sorted(kinds)
    ]


class _BranchMode(TorchFunctionMode):
    """While entered, adds branches to the convolution calls of an owner's sites.

    Args:
        owner: The owner.
        owned: What to look for.
        counts: Whether the calls looked for are counted.
    """

    def __init__(self, owner: CallOwner, owned: Sequence[_Site], counts: bool) -> None:
        super().__init__()
        self.owner = owner
        self.counts = counts
        self.owned = [(site, _stored_weight(owner, site)) for site in owned]
        self.seen = [0] * len(owned)
        self.strays: list[tuple[Any, Any]] = []
        self.sees_padding = any(site.calls.padding.amounts for site in owned)
        self.padded: list[tuple[Any, dict[str, Any]]] = []
        self.trains = torch.is_grad_enabled()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        output = func(*args, **kwargs)
        if func in _FUNCTIONS:
            arguments = dict(zip(CONV_SIGNATURES[func], args, strict=False)) | dict(kwargs)
            return self._with_branches(func, arguments, output)
        if self.sees_padding and func is F.pad:
            self.padded.append((output, pad_arguments(func, args, kwargs)))
        return output

    def _with_branches(self, func: Any, arguments: dict[str, Any], output: Any) -> Any:
        weight = arguments["weight"]
        is_stray = not _is_stored(weight)
        for index, (site, stored) in enumerate(self.owned):
            if func is not site.function:
                continue
            if weight is not stored if stored is not None else _is_stored(weight):
                continue
            is_stray = False
            position = self.seen[index]
            self.seen[index] += 1
            indices = site.calls.indices
            if indices is None or position in indices:
                output = self._with_branch(site, func, arguments, output)
        if is_stray:
            self.strays.append((func, None if isinstance(weight, fx.Proxy) else weight.shape))
        return output

    def _with_branch(self, site: _Site, func: Any, arguments: dict[str, Any], output: Any) -> Any:
        self._check_not_in_a_checkpoint(site)
        given, own = self._input(site, arguments)
        branch = cast(CoordBranch, self.owner.get_submodule(site.branch))
        if isinstance(given, fx.Proxy):  # somebody traces
            return output + branch(given)
        if not _is_call_of(site.geometry, arguments, own):
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
        return output.add_(added) if is_own and not is_transforming() else output + added

    def _input(self, site: _Site, arguments: dict[str, Any]) -> tuple[Any, OwnPadding]:
        """The convolution's input, before the code padded it where the site says that it does."""
        given, expected = arguments["input"], site.calls.padding
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
                    f"{site.calls.function} with one that it computes (another dtype, or a "
                    "parametrization that was added since): unpatch the model, and patch it anew "
                    "with example inputs that run this way"
                )
            if self.counts and seen not in (0, site.calls.total):
                raise PatchError(
                    f"{site.name} is told from other convolutions by its position among "
                    f"{site.calls.total} calls of {site.calls.function} in {_place(site)}, "
                    f"which now made {seen}: patch the model anew with example inputs that run "
                    "this way, or store the weight as a Parameter of its own"
                )

    def _has_stray_like(self, site: _Site, stored: Any) -> bool:
        shape = None if isinstance(stored, fx.Proxy) else stored.shape
        return any(
            func is site.function and (shape is None or other is None or other == shape)
            for func, other in self.strays
        )

    def _check_not_in_a_checkpoint(self, site: _Site) -> None:
        """Refuse a checkpoint around code that would run again without the mode.

        A checkpointed *method* of the owner enters the mode when it runs again; a function
        inside of a method does not, and its gradients would be wrong without a word.
        """
        if not self.trains or torch.compiler.is_compiling():
            return
        frame: FrameType | None = sys._getframe(1)
        checkpointed = False
        while frame is not None and frame.f_code not in _ENTERED:
            checkpointed |= frame.f_code in _CHECKPOINTS
            frame = frame.f_back
        if checkpointed:
            raise PatchError(
                f"{site.name}: gradient checkpointing of a function inside {_place(site)} runs "
                "it again without its coordinates: checkpoint the module, or one of its methods"
            )


def _is_call_of(geometry: ConvGeometry, arguments: Mapping[str, Any], own: OwnPadding) -> bool:
    """Whether a call has a geometry; in terms that torch.compile can follow, and quick."""
    ndim = geometry.ndim
    groups, weight = arguments.get("groups", 1), arguments["weight"]
    in_channels, out_channels = geometry.in_channels, geometry.out_channels
    channels = (out_channels, in_channels // groups)
    if geometry.transposed:
        channels = (in_channels, out_channels // groups)
    padding = geometry.padding if own.declared is None else (0,) * ndim
    output_padding = geometry.output_padding if geometry.transposed else (0,) * ndim
    return (
        groups == geometry.groups
        and tuple(weight.shape) == (*channels, *geometry.kernel_size)
        and _spread(arguments.get("stride", 1), ndim) == geometry.stride
        and _spread(arguments.get("dilation", 1), ndim) == geometry.dilation
        and _spread(arguments.get("output_padding", 0), ndim) == output_padding
        and _padding_of(arguments.get("padding", 0), ndim) == padding
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


def _place(site: _Site) -> str:
    return site.calls.owner or "the model"


def _stored_weight(owner: nn.Module, site: _Site) -> Any:
    """The weight by which the calls are known; ``None`` where they are known by position."""
    name = site.calls.weight
    if name is None:
        return None
    return operator.attrgetter(name)(owner)


def _is_stored(weight: Any) -> bool:
    """Whether a weight is a parameter, not computed."""
    if isinstance(weight, fx.Proxy):
        return weight.node.op == "get_attr"
    return isinstance(weight, nn.Parameter)


def owner_obstacle(owner: nn.Module) -> str:
    """Why the calls of a module cannot be watched; empty if they can."""
    name = type(owner).__name__
    if "forward" in vars(owner):
        return (
            f"the forward of {name} is replaced on the instance (accelerate hooks, perhaps), which "
            "would bypass the coordinates: patch the model before"
        )
    if isinstance(owner, _ConvNd):
        return f"{name} is a convolution itself, and not a module that calls one"
    if isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return (
            f"{name} calls it and is a {_container(owner)}, whose members are run one by one, and "
            "the branch would be one of them: make it a torch.nn convolution module"
        )
    return ""


def _container(owner: nn.Module) -> str:
    kinds = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next(f"torch.nn.{kind.__name__}" for kind in kinds if isinstance(owner, kind))


def add_to_owner_(
    model: nn.Module,
    site: str,
    calls: OwnedCalls,
    geometry: ConvGeometry,
    coords: Coordinates,
    weight: Tensor,
    chosen: ChosenCalls | None = None,
) -> None:
    """Give the calls of one site coordinates, in place; their weight starts at zero.

    Args:
        model: The model.
        site: The site's name.
        calls: Which calls.
        geometry: Their geometry.
        coords: The convention.
        weight: A tensor on the device and in the dtype that the coordinate weight gets.
        chosen: Which of the site's calls these are; ``None``: every one.
    """
    owner = model.get_submodule(calls.owner)
    branch = CoordBranch(
        geometry, coords, padding=calls.padding.rule, device=weight.device, dtype=weight.dtype
    )
    branch.training = owner.training
    branch.chosen_calls = chosen
    name = _branch_name(owner, site[len(calls.owner) :].lstrip("."))
    before = type(owner)
    if not isinstance(owner, CallOwner):
        if parametrize.is_parametrized(owner):
            # torch takes a parametrized module back to its first base class when the last
            # parametrization is removed, so the owner's class goes beneath.
            base = _owner_class(cast("type[nn.Module]", before.__bases__[0]))
            owner.__class__ = _on_other_base(before, base)
        else:
            owner.__class__ = _owner_class(before)
    holder, _, last = name.rpartition(".")
    owner.get_submodule(holder).add_module(last, branch)
    owned = cast(CallOwner, owner)._coord_sites
    owner.__dict__["_coord_sites"] = (*owned, _Site(site, calls, geometry, name))


def _branch_name(owner: nn.Module, holder: str) -> str:
    """Where a site's branch goes: into the module that the site is named after, or beside."""
    if not holder:
        return BRANCH_NAME
    is_module = holder in dict(owner.named_modules())
    return f"{holder}.{BRANCH_NAME}" if is_module else f"{holder}_{BRANCH_NAME}"


def _on_other_base(parametrized: type, base: type) -> type:
    """The class that torch made for a parametrized module, on another base class."""
    hidden = ("__dict__", "__weakref__")
    namespace = {name: value for name, value in vars(parametrized).items() if name not in hidden}
    return type(parametrized)(parametrized.__name__, (base,), namespace)


def geometry_of_calls(owner: nn.Module, calls: OwnedCalls) -> ConvGeometry | None:
    """The geometry of calls that have coordinates already; ``None`` if these have none.

    Args:
        owner: The module that makes the calls.
        calls: The calls; of computed weights, positions may be unknown.
    """
    for site in owner._coord_sites if isinstance(owner, CallOwner) else ():
        known = site.calls
        if (known.function, known.weight) == (calls.function, calls.weight) and (
            calls.weight is not None
            or calls.indices is None
            or not set(calls.indices).isdisjoint(known.indices or ())
        ):
            return site.geometry
    return None


def owned_calls(model: nn.Module) -> dict[nn.Module, OwnedCalls]:
    """Which calls each branch of a model's call owners is for, named as they are now."""
    return {
        owner.get_submodule(site.branch): replace(site.calls, owner=name)
        for name, owner in model.named_modules()
        if isinstance(owner, CallOwner)
        for site in owner._coord_sites
    }


def remove_from_owner_(owner: CallOwner) -> None:
    """Inverse of :func:`add_to_owner_`, for all of an owner's sites."""
    for site in owner._coord_sites:
        holder, _, last = site.branch.rpartition(".")
        delattr(owner.get_submodule(holder), last)
    del owner.__dict__["_coord_sites"]
    before = type(owner)
    plain: type = owner._plain_class
    if parametrize.is_parametrized(owner):
        plain = _on_other_base(before, plain)
    owner.__class__ = plain  # it is a CallOwner no longer
