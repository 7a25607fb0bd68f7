"""A watch: the hooks on one module that look whether coordinates were left behind."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.compiler import is_dynamo_compiling  # by itself: compiled code checks each step

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.norms import is_batch_norm
from coordconv_patch.layers.capture import is_transforming
from coordconv_patch.layers.weight_marks import is_plain
from coordconv_patch.left_behind.glances import Glance
from coordconv_patch.left_behind.heir_modules import Heir
from coordconv_patch.left_behind.inventory import Inventory
from coordconv_patch.left_behind.last_weights import mark_of
from coordconv_patch.left_behind.messages import on_doubles
from coordconv_patch.left_behind.race import Race
from coordconv_patch.left_behind.verdicts import check_gone, check_hooks, doubles_of
from coordconv_patch.left_behind.weight_changes import check_changes
from coordconv_patch.running.torch_versions import set_dynamo_callback, skip_in_dynamo
from coordconv_patch.running.untraced import untraced
from coordconv_patch.running.version_counters import version_of

__all__ = ["Watch", "watches_on"]


class Watch:
    """Looks at one module: a hook before its forward, and before its ``state_dict``.

    It holds the module weakly, and its convolutions and batch norms strongly: when one is gone
    from its place, its last weights are still here until the next look. It copies and pickles
    with the module.
    """

    inner: Sequence[Watch] = ()
    """The watches of modules inside, which need not look again when this one has."""
    is_seen: bool = False
    """Whether one further out has looked, before the module's forward that comes next."""
    is_judged: bool = False
    """Whether one further out has judged the module, for the pickle that both will be in."""
    _glance: Glance | None
    _module: Callable[[], nn.Module | None]

    def __init__(self, prefix: str, module: nn.Module) -> None:
        self.inventory = Inventory(prefix)
        self.take_stock(module)

    def attach(self, module: nn.Module) -> None:
        """Hook into the module."""
        module.register_forward_pre_hook(self)
        before: Any = module.register_state_dict_pre_hook  # torch does not annotate it
        before(_BeforeStateDict(self))
        if isinstance(module, fx.GraphModule) and hasattr(module, "_deepcopy_hooks"):
            module._deepcopy_hooks.append(_OnGraphCopy(self))  # its copies keep no other hooks

    def detach(self, module: nn.Module) -> None:
        """Take all the hooks away."""
        hooks: list[dict[int, Any]] = [module._forward_pre_hooks, module._state_dict_pre_hooks]
        for registered in hooks:
            for key, hook in list(registered.items()):
                if hook is self or getattr(hook, "watch", None) is self:
                    del registered[key]
        if isinstance(module, fx.GraphModule) and hasattr(module, "_deepcopy_hooks"):
            kept = [h for h in module._deepcopy_hooks if getattr(h, "watch", None) is not self]
            module._deepcopy_hooks[:] = kept

    def __call__(self, module: nn.Module, args: Any) -> None:
        # Nothing of the watch may be read while dynamo goes through this: it would compile a
        # forward anew for each model of a kind, and give up at the ninth.
        if is_dynamo_compiling():
            from torch._dynamo.comptime import comptime

            comptime(_look_while_compiling)
            return
        compiling = set_dynamo_callback(None)
        if compiling is None:
            self.look(module, runs=True)
            return
        try:
            self.look(module, parts_look=True)
        finally:
            set_dynamo_callback(compiling)

    def look(self, module: nn.Module, *, runs: bool = False, parts_look: bool = False) -> None:
        """Look at the module; closely only where it has changed.

        Args:
            module: The module.
            runs: Whether its forward comes next.
            parts_look: Whether the watches inside are to look too, when their forwards come. In
                compiled code they may not come, and what is noted of them would stay.
        """
        glance, was_seen, self.is_seen = self._glance, self.is_seen, False
        if was_seen or "_is_replica" in module.__dict__:  # DataParallel's have their own modules
            return
        for watch in () if parts_look else self.inner:
            watch.is_seen = True
        if glance is None or glance.module() is not module or glance.shows_other_structure():
            self.look_closely(module, can_wait=False, runs=runs)
        elif glance.convs and not module.training and not is_transforming():
            # is_transforming: a capture may see other tensors in the place of the real ones
            with untraced() if torch._C._is_tracing() else contextlib.nullcontext():
                self._look_at_values(module, glance)

    def _look_at_values(self, module: nn.Module, glance: Glance) -> None:
        """Look at the weights' values, and keep up with a training."""
        if glance.shows_other_weights():  # first: the memory of those that were may be freed (FSDP)
            if all(map(is_plain, glance.weights_there())):
                self.look_closely(module, can_wait=False)
            return  # else a functional call, or a wrapper that brings the weights later
        others = glance.shows_other_values()
        if others and (glance.shows_silent_change() or glance.shows_new_bias()):
            self.look_closely(module, can_wait=False)
        elif others or glance.shows_other_coords():
            for conv, weight in zip(glance.convs, glance.weights, strict=True):
                mark = conv.__dict__.get("weight_mark")
                coords = conv._parameters.get("coord_weight")
                if mark is None or coords is None:
                    continue
                if (version_of(weight), version_of(coords)) != (mark.version, mark.coord_version):
                    conv.__dict__["weight_mark"] = mark_of(conv, weight)
            self._glance = glance.renewed()

    @torch.no_grad()
    def look_closely(self, module: nn.Module, *, can_wait: bool = True, runs: bool = False) -> None:
        """Judge what has become of layers that are gone, and of the weights of the others.

        Args:
            module: The module.
            can_wait: Whether values on other devices may be waited for.
            runs: Whether its forward comes next.

        Raises:
            PatchError: If coordinates were surely left behind.
        """
        doubles = self._judge(module, can_wait=can_wait)
        if is_transforming():
            return  # weights may be fake now: so do not remember them
        if doubles and runs:
            Race(self.inventory, module, doubles, self.accept)  # which of them runs decides
            return
        self._warn_of(doubles)
        self.accept(module)

    def _judge(self, module: nn.Module, *, can_wait: bool) -> dict[str, Heir]:
        """Raise or warn of what is lost; returns new modules with weights of layers still there."""
        with untraced():
            present = set(module.modules())
            layers = self.inventory.layers
            gone = {name: layer for name, layer in layers.items() if layer not in present}
            check_hooks(module, self.inventory.prefix)
            check_gone(self.inventory, module, gone)
            norm_gone = any(is_batch_norm(layer) for layer in gone.values())
            can_wait = can_wait or norm_gone
            check_changes(self.inventory, module, norm_gone=norm_gone, can_wait=can_wait)
            return doubles_of(self.inventory, module, present)

    def _warn_of(self, doubles: dict[str, Heir]) -> None:
        if doubles:
            sites = self.inventory.sites({name: str(heir) for name, heir in doubles.items()})
            warnings.warn(on_doubles(sites), stacklevel=3)

    def accept(self, module: nn.Module) -> None:
        """Take the module as it is, here and in the watches inside."""
        for inner in reversed(list(module.modules())):  # those inside would say the same again
            for watch in watches_on(inner):
                watch.take_stock(inner)

    def take_stock(self, module: nn.Module) -> None:
        """Take the module as it is for what it should be; those inside have done so before."""
        with untraced():
            self._module = weakref.ref(module)
            self.inner = [
                watch
                for part in module.modules()
                for watch in watches_on(part)
                if watch is not self
            ]
            parts = [watch.inventory for watch in self.inner]
            self.inventory = Inventory.of(module, self.inventory.prefix, parts)
            self._glance = Glance.at(module, self.inventory.layers)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: a model is being saved, so this is the time to look at it.

        Nothing is renewed: what was pickled a moment ago must live on. A tensor goes to a spawned
        process as the number of the open file that is its memory, and freeing it closes the file.
        """
        module = self._module()
        was_judged, self.is_judged = self.is_judged, False
        if module is not None and not was_judged:
            for watch in self.inner:
                watch.is_judged = True
            with torch.no_grad():
                self._warn_of(self._judge(module, can_wait=True))
        if module is None:
            return {"inventory": self.inventory, "module": None}
        return {"inventory": self.inventory.without_gone(module), "module": module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.inventory, module = state["inventory"], state["module"]
        self._module = (lambda: None) if module is None else weakref.ref(module)
        self._glance = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        other = memo[id(self)] = Watch.__new__(Watch)
        module = memo.get(id(self._module()))  # the copy, if the module is being copied
        inventory = copy.deepcopy(self.inventory, memo)
        other.__setstate__({"inventory": inventory, "module": module})
        return other


def watches_on(module: nn.Module) -> list[Watch]:
    """The watches that one module has."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Watch)]


class _BeforeStateDict:
    """Looks before a ``state_dict()``, with which models are saved and exported."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.watch.look(module)


class _OnGraphCopy:
    """Hooks a watch's copy into the copy of a GraphModule, which takes no hooks along."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, graph_copy: fx.GraphModule) -> None:
        for hook in list(graph_copy._deepcopy_hooks):
            if isinstance(hook, _OnGraphCopy) and hook.watch._module() is graph_copy:
                graph_copy._deepcopy_hooks.remove(hook)
                hook.watch.attach(graph_copy)


def _look_while_compiling(context: Any) -> None:
    """Look while torch.compile, or a strict torch.export, goes through the hook.

    Errors cannot come out of dynamo as they are, so they are warnings here.
    """
    variable = context.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker()
    watch: Watch = variable.realize().value
    module = watch._module()
    try:
        if module is not None:
            watch.look(module)
    except PatchError as error:
        warnings.warn(str(error), stacklevel=2)


# Where the hook is the outermost that dynamo sees, it runs as it is.
skip_in_dynamo(Watch.__call__.__code__)
