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
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack

from coordconv_patch.layers.branch import CoordBranch, branch_name
from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.layers.conversion import on_other_base
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import ConvGeometry
from coordconv_patch.layers.unsupported import refuse_script
from coordconv_patch.owners.branch_mode import ENTERED_CODE, BranchMode, OwnedSite
from coordconv_patch.owners.class_in_place import InPlaceMixin, class_in_place, class_without
from coordconv_patch.owners.owned_calls import OwnedCalls

__all__ = [
    "CallOwner",
    "add_to_owner_",
    "geometry_of_calls",
    "own_methods",
    "owned_calls",
    "owner_obstacle",
    "remove_from_owner_",
]


class CallOwner(InPlaceMixin):
    """Mixed in before the class of a module whose own convolution calls see coordinates."""

    _plain_class: type[nn.Module]
    """The class that the module has without coordinates."""
    _coord_sites: tuple[OwnedSite, ...] = ()
    """Empty in what somebody makes by ``type(module)(...)``: it computes as a plain module."""

    class_below_name = "_plain_class"

    @classmethod
    def _methods_in_place(cls, below: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        return {name: _under_mode(below, name) for name in own_methods(below)}

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script calls first.

        Raises:
            PatchError: If any calls have coordinates, with what to do instead.
        """
        return refuse_script(self) if self._coord_sites else self


def own_methods(plain: type[nn.Module]) -> list[str]:
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

    ENTERED_CODE.add(cast(FunctionType, entered).__code__)
    return entered


def _modes_for(owner: CallOwner, is_forward: bool) -> list[BranchMode]:
    """The modes that are to be entered for a call of one of an owner's methods.

    Calls are counted in the forward alone. A method that runs inside of another one of the
    same owner finds its modes there already.
    """
    owned = owner._coord_sites
    kinds = {site.counts for site in owned if is_forward or not site.counts}
    for mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        if type(mode) is BranchMode and mode.owner is owner:
            kinds.discard(mode.counts)
    return [
        BranchMode(owner, [site for site in owned if site.counts is counts], counts)
        for counts in sorted(kinds)
    ]


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
    owned: OwnedCalls,
    geometry: ConvGeometry,
    coords: Coordinates,
    weight: Tensor,
    chosen: ChosenCalls | None = None,
) -> None:
    """Give the calls of one site coordinates, in place; their weight starts at zero.

    Args:
        model: The model.
        site: The site's name.
        owned: Which calls.
        geometry: Their geometry.
        coords: The convention.
        weight: A tensor on the device and in the dtype that the coordinate weight gets.
        chosen: Which of the site's calls these are; ``None``: every one.
    """
    owner = model.get_submodule(owned.owner)
    branch = CoordBranch(
        geometry, coords, padding=owned.padding.rule, device=weight.device, dtype=weight.dtype
    )
    branch.training = owner.training
    branch.chosen_calls = chosen
    name = branch_name(owner, site[len(owned.owner) :].lstrip("."))
    before = type(owner)
    if not isinstance(owner, CallOwner):
        if parametrize.is_parametrized(owner):
            # torch takes a parametrized module back to its first base class when the last
            # parametrization is removed, so the owner's class goes beneath.
            base = class_in_place(CallOwner, cast("type[nn.Module]", before.__bases__[0]))
            made = on_other_base(before, base)
        else:
            made = class_in_place(CallOwner, before)
        object.__setattr__(owner, "__class__", made)  # its own __setattr__ may refuse
    holder, _, last = name.rpartition(".")
    owner.get_submodule(holder).add_module(last, branch)
    before_it = cast(CallOwner, owner)._coord_sites
    owner.__dict__["_coord_sites"] = (*before_it, OwnedSite(site, owned, geometry, name))


def geometry_of_calls(owner: nn.Module, owned: OwnedCalls) -> ConvGeometry | None:
    """The geometry of calls that have coordinates already; ``None`` if these have none.

    Args:
        owner: The module that makes the calls.
        owned: The calls; of computed weights, positions may be unknown.
    """
    for site in owner._coord_sites if isinstance(owner, CallOwner) else ():
        known = site.owned
        if (known.function, known.weight) == (owned.function, owned.weight) and (
            owned.weight is not None
            or owned.indices is None
            or not set(owned.indices).isdisjoint(known.indices or ())
        ):
            return site.geometry
    return None


def owned_calls(model: nn.Module) -> dict[nn.Module, OwnedCalls]:
    """Which calls each branch of a model's call owners is for, named as they are now."""
    return {
        owner.get_submodule(site.branch): replace(site.owned, owner=name)
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
    before: Any = type(owner)
    is_parametrized = parametrize.is_parametrized(owner)
    plain: Any = class_without(CallOwner, before.__bases__[0] if is_parametrized else before)
    # It is a CallOwner no longer.
    restored = on_other_base(before, plain) if is_parametrized else plain
    object.__setattr__(owner, "__class__", restored)
