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

import dis
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any, cast

import torch
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
from coordconv_patch.running.class_change import set_class

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

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the coordinates where somebody gives the module another class, or a forward.

        Either one's convolution calls are looked at as those of the module's own code were.
        """
        if self._coord_sites and name in _CODE:
            if name == "forward" and callable(value):
                value = ForwardUnderMode(self, value)
            elif name == "__class__" and not issubclass(value, CallOwner):
                value = class_in_place(CallOwner, value)
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script calls first.

        Raises:
            PatchError: If any calls have coordinates, with what to do instead.
        """
        return refuse_script(self) if self._coord_sites else self


_CODE = frozenset({"forward", "__class__"})
"""Attributes by which a module gets other code."""


class ForwardUnderMode:
    """A forward that was put on an instance after its calls got coordinates.

    Args:
        owner: The module.
        forward: What was put there; it may call the forward that was there before.
    """

    def __init__(self, owner: CallOwner, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # code asks forwards for their signature
        self.owner, self.forward = owner, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self.owner, "forward", self.forward, args, kwargs)


def own_methods(plain: type[nn.Module]) -> list[str]:
    """Names of the methods that a class adds to nn.Module, its forward among them.

    Not the forward alone: callers may begin at another method (``vae.encode(x)``), and gradient
    checkpointing calls a method again when its forward is long over.
    """
    bases = plain.__mro__[: plain.__mro__.index(nn.Module)]
    names = {name for base in bases for name in vars(base) if not name.startswith("__")}
    methods = {name for name in names if _is_plain_method(inspect.getattr_static(plain, name))}
    # Called as ever, it would be the forward of the class below.
    if inspect.getattr_static(plain, "__call__") is inspect.getattr_static(plain, "forward"):
        methods.add("__call__")
    return sorted(methods | {"forward"})


def _is_plain_method(value: Any) -> bool:
    if not isinstance(value, FunctionType):
        return False
    late = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return not any(runs_late(value) for runs_late in late)


def _under_mode(plain: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(plain, name))
    def entered(self: CallOwner, *args: Any, **kwargs: Any) -> Any:
        method = getattr(plain, name)  # looked up anew: classes get other methods at run time
        return _run(self, name, method, (self, *args), kwargs)

    return entered


def _run(
    owner: CallOwner,
    name: str,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run one of an owner's methods under the modes that it needs."""
    modes = _modes_for(owner, name)
    if not modes:
        return method(*args, **kwargs)
    if len(modes) == 1:
        with modes[0]:
            output = method(*args, **kwargs)
    else:
        with modes[0], modes[1]:
            output = method(*args, **kwargs)
    for mode in modes:
        mode.check()
    return output


ENTERED_CODE.add(_run.__code__)


def _modes_for(owner: CallOwner, method: str) -> list[BranchMode]:
    """The modes that are to be entered for a call of one of an owner's methods.

    Calls are counted in the forward alone: another method that runs without one may not make
    any. A method that runs inside of another one of the same owner finds its modes there.
    """
    owned = owner._coord_sites
    kinds = {site.counts for site in owned}
    for mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        if type(mode) is BranchMode and mode.owner is owner:
            kinds.discard(mode.counts)
    alone = "" if method in ("forward", "__call__") else method
    return [
        BranchMode(
            owner,
            [site for site in owned if site.counts is counts],
            counts,
            alone if counts else "",
        )
        for counts in sorted(kinds)
    ]


def owner_obstacle(owner: nn.Module, weight: str | None = None) -> str:
    """Why the calls of a module cannot be watched; empty if they can.

    Args:
        owner: The module.
        weight: Name of the weight that it calls with; ``None`` where it is computed.
    """
    name = type(owner).__name__
    if "forward" in vars(owner):
        return (
            f"the forward of {name} is replaced on the instance (accelerate hooks, perhaps), which "
            "would bypass the coordinates: patch the model before"
        )
    if isinstance(owner, _ConvNd):
        return f"{name} is a convolution itself, and not a module that calls one"
    if not callable(getattr(type(owner), "forward", None)):
        return f"the forward of {name} is not a method, so its calls cannot be watched"
    for module, does in ((owner, "calls it"), (_holder(owner, weight), "stores its weight")):
        if isinstance(module, torch.jit.ScriptModule):
            return f"{type(module).__name__} {does} and is TorchScript, which takes no new members"
        if how := _runs_its_members(module):
            return (
                f"{type(module).__name__} {does} and {how}, whose members are run one by one, and "
                "the branch would be one of them: make it a torch.nn convolution module"
            )
    return ""


def _holder(owner: nn.Module, weight: str | None) -> nn.Module:
    """The module that a branch is put into: that which stores the weight, or the owner."""
    name = "" if weight is None else weight.rpartition(".")[0]
    return owner.get_submodule(name) if name in dict(owner.named_modules()) else owner


def _runs_its_members(module: nn.Module) -> str:
    """How a module runs whatever its members are, in words; empty if it does not."""
    for kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
        if isinstance(module, kind):
            return f"is a torch.nn.{kind.__name__}"
    forward = inspect.unwrap(type(module).forward)
    if isinstance(forward, FunctionType) and _LISTINGS.intersection(forward.__code__.co_names):
        before = ""
        for instruction in dis.get_instructions(forward):
            of_itself = before == forward.__code__.co_varnames[0]
            if of_itself and instruction.argval in _LISTINGS:
                return f"goes through its own {instruction.argval}"
            before = instruction.argval if instruction.opname.startswith("LOAD_FAST") else ""
    return ""


_LISTINGS = frozenset({"children", "named_children", "_modules", "modules", "named_modules"})


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
            set_class(owner, on_other_base(before, base))
        else:
            set_class(owner, class_in_place(CallOwner, before))
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
    set_class(owner, on_other_base(before, plain) if is_parametrized else plain)
    if isinstance(own := vars(owner).get("forward"), ForwardUnderMode):
        vars(owner)["forward"] = own.forward
