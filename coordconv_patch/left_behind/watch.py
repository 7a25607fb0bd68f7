"""Coordinates that other code has left behind, noticed at the next use of the model.

Code that rewrites a patched model for inference may know ``weight`` and nothing of
``coord_weight``: a folding function makes a new convolution of a weight and a batch norm, a
re-parametrisation sums branches into one kernel, a quantization library puts a class of its own
in place of each convolution, a script scales ``weight.data``. The model then runs, without the
coordinates that were trained, or with coordinates of another scale.

``patch`` puts a *watch* on the model, and on its parts down to where its coordinate layers part
ways (a part may be used alone). It looks at each forward and at each ``state_dict()``, when the
model is pickled, and when :func:`coordconv_patch.export_onnx`, :func:`coordconv_patch.fold` or
:func:`coordconv_patch.save_coords` are called. ``unpatch`` takes it away.

A look compares, at each forward, whether every convolution and batch norm is still where it was
(35 nanoseconds each), and in evaluation on the CPU a few numbers of each weight (a microsecond).
On other devices values are compared only where the device may be waited for: at an export, a
fold, a save or a pickle, and when batch norms have gone. Only where something has changed, the
weights themselves are compared. With a trained (non-zero) coordinate weight:

- The layer is gone, and a module that is new or changed has its weight, scaled by output channel
  or summed with other convolutions that are gone: an *error*, the outputs lack the coordinates.
  If the heir's coordinate weight is scaled and summed alike, or its weight is that of the
  published, concatenating form: nothing, they were carried along.
- It is there, and so is a new module that has its weight, without its coordinates: an *error*
  after the forward if the new one ran, and the layer did not; a *warning* where there is no
  forward that decides (a save, an export, a compilation).
- It is gone, and channels of its weight are in a new convolution with other numbers of channels:
  a *warning*, since it may have been made wider or narrower on purpose.
- It is gone, and nothing has its weight (a new head, a branch removed), or it is inside a wrapper
  (LoRA, FSDP, checkpointing): nothing.
- Its output channels were scaled, its coordinate weight was not, and a batch norm is gone or a
  bias is new: an *error*, a batch norm was folded in.
- The same, but batch norms and bias are as they were: through ``.data`` a *warning*, since it may
  be the scale of the input; by an operation that autograd knows, nothing.
- Its weight changed in any other way (training, weight decay, pruning, loading): nothing.

An error comes again at each look until the model is mended, unpatched, or the loss is accepted
with :func:`forget_left_behind_`; a warning comes once.

What is not seen: a model built anew from the weights alone (there is nothing of this package in
it), a GraphModule that somebody's symbolic trace made of the whole model, or one that went
through pickle, which keeps no hooks; a change of ``.data`` while compiled code runs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import _disable_current_modes

from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.functional import join_names
from coordconv_patch.graphs.norms import is_batch_norm
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.capture import is_transforming
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.weight_marks import is_plain, rows_of, sample_of
from coordconv_patch.left_behind.glances import Glance
from coordconv_patch.left_behind.heir_modules import (
    Heir,
    inheritance_of,
    tensors_of,
    weights_being_exported,
)
from coordconv_patch.left_behind.heirs import holds_part_of, is_published_form
from coordconv_patch.left_behind.last_weights import (
    is_coord_layer,
    is_trained,
    kernel_of,
    layout_of,
    mark_of,
    site_of,
    weight_of,
)
from coordconv_patch.left_behind.messages import (
    on_doubles,
    on_heirs,
    on_parts,
    on_scales,
    on_silent_scales,
)
from coordconv_patch.running.inputs import check_is_module

__all__ = [
    "check_left_behind",
    "dismiss_",
    "forget_left_behind_",
    "is_watched",
    "release_watches_",
    "renewing_watches",
    "watch_",
]


def watch_(model: nn.Module, prefix: str = "") -> None:
    """Put watches on a patched model and its parts, in place of those that it had.

    Args:
        model: The model.
        prefix: Its own qualified name, for messages.
    """
    release_watches_(model)
    for name, part in reversed(list(_parts(model))):  # each finds those further in
        _Watch(join_names(prefix, name), part).attach(part)


def release_watches_(model: nn.Module) -> None:
    """Inverse of :func:`watch_`, for all the modules in a model."""
    for module in model.modules():
        for watch in _watches_on(module):
            watch.detach(module)


def is_watched(model: nn.Module) -> bool:
    """Whether a model, or a module in it, has a watch on it."""
    return any(_watches_on(module) for module in model.modules())


def dismiss_(model: nn.Module) -> None:
    """Tell watches further out that a model's coordinate layers are about to be taken off."""
    for layer in coord_layers(model).values():
        if isinstance(layer, CoordBranch):  # others become plain convolutions, which shows
            layer.__dict__["is_dismissed"] = True


@contextmanager
def renewing_watches(model: nn.Module) -> Iterator[None]:
    """Let a block rewrite a model that carries the coordinates along; watches see the outcome."""
    prefixes = [watch.prefix for watch in _watches_on(model)]
    watched = is_watched(model)
    release_watches_(model)
    try:
        yield
    finally:
        if watched:
            watch_(model, *prefixes[:1])


def check_left_behind(model: nn.Module) -> None:
    """Look whether coordinates were left behind, at values on every device.

    Raises:
        PatchError: If they were, surely; of what may be meant it warns.
    """
    for module in list(model.modules()):
        for watch in _watches_on(module):
            watch.look_closely(module)


def forget_left_behind_(model: nn.Module) -> nn.Module:
    """Accept that coordinates are gone which other code has left behind.

    After a :class:`coordconv_patch.errors.PatchError` that says so, for a model that is meant
    to run without them. Coordinates of other layers stay.

    Args:
        model: A model that was patched.

    Returns:
        The model itself.

    Raises:
        PatchError: If the model is not a module.
    """
    check_is_module(model)
    for module in list(model.modules()):
        for watch in _watches_on(module):
            watch.take_stock(module)
    return model


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, and its parts down to where its coordinate layers part ways, with names."""
    if isinstance(model, (CoordConvNd, CoordBranch)) or not coord_layers(model):
        return  # a layer alone has no place to be gone from, and no microsecond to spare
    yield "", model
    name, inner = "", model
    while True:
        parts = [
            (join_names(name, child_name), child)
            for child_name, child in inner.named_children()
            if not isinstance(child, (_ConvNd, CoordBranch)) and coord_layers(child)
        ]
        yield from parts
        if len(parts) != 1:
            return
        name, inner = parts[0]


def _watches_on(module: nn.Module) -> list[_Watch]:
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Watch)]


_WATCHES: weakref.WeakValueDictionary[str, _Watch] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


class _Watch:
    """Looks at one module: a hook before its forward, and before its ``state_dict``.

    It holds the module weakly, and its convolutions and batch norms strongly: when one is gone
    from its place, its last weights are still here until the next look. It copies and pickles
    with the module.

    Attributes:
        prefix: The module's qualified name, for messages.
        layers: The convolutions, coordinate branches and batch norms by qualified name.
        weights: The weight of each convolution among them. Held beside the layers, since a
            library that replaces a layer may empty it (optimum-quanto).
        coords: Likewise the coordinate weights.
        samples: Some values of each plain convolution's weight; of coordinate layers a mark
            on the layer has them.
    """

    inner: Sequence[_Watch] = ()
    """The watches of modules inside, which need not look again when this one has."""
    is_seen: bool = False
    """Whether one further out has looked, before the module's forward that comes next."""
    _glance: Glance | None
    _module: Callable[[], nn.Module | None]

    def __init__(self, prefix: str, module: nn.Module) -> None:
        self.prefix = prefix
        self._enrol()
        self.take_stock(module)

    def _enrol(self) -> None:
        self.key = str(next(_KEYS))  # dynamo makes symbols of numbers
        _WATCHES[self.key] = self

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
        if torch.compiler.is_dynamo_compiling():
            _look_while_compiling(self.key)
        else:
            self.look(module, runs=True)

    def look(self, module: nn.Module, *, runs: bool = False) -> None:
        """Look at the module, whose forward may come next; closely only where it has changed."""
        glance, was_seen, self.is_seen = self._glance, self.is_seen, False
        if was_seen or "_is_replica" in module.__dict__:  # DataParallel's have their own modules
            return
        for watch in self.inner:
            watch.is_seen = True
        if glance is None or glance.module() is not module or glance.shows_other_structure():
            self.look_closely(module, can_wait=False, runs=runs)
        elif glance.convs and not module.training and not is_transforming():
            # is_transforming: a capture may see other tensors in the place of the real ones
            with _unseen() if torch._C._is_tracing() else contextlib.nullcontext():
                self._look_at_values(module, glance)

    def _look_at_values(self, module: nn.Module, glance: Glance) -> None:
        """Look at the weights' values, and keep up with a training."""
        if glance.shows_other_weights():  # first: the memory of those that were may be freed (FSDP)
            if all(is_plain(owner.get("weight")) for owner in glance.owners):
                self.look_closely(module, can_wait=False)
            return  # else a functional call, or a wrapper that brings the weights later
        others = glance.shows_other_values()
        if others and glance.shows_silent_change():
            self.look_closely(module, can_wait=False)
        elif others or glance.shows_other_coords():
            for conv, weight in zip(glance.convs, glance.weights, strict=True):
                mark, coords = (
                    conv.__dict__.get("weight_mark"),
                    conv._parameters.get("coord_weight"),
                )
                if mark is None or coords is None:
                    continue
                if (weight._version, coords._version) != (mark.version, mark.coord_version):
                    conv.weight_mark = mark_of(conv, weight)
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
        with _unseen():
            present = set(module.modules())
            gone = {name: layer for name, layer in self.layers.items() if layer not in present}
            self._judge_gone(module, gone)
            norm_gone = any(is_batch_norm(layer) for layer in gone.values())
            self._judge_scales(norm_gone=norm_gone, can_wait=can_wait or norm_gone)
            doubles = self._doubles(module, present)
        if is_transforming():
            return  # weights may be fake now: this is no moment to remember them
        if doubles and runs:
            _Race(self, module, doubles)  # which of them runs decides
            return
        if doubles:
            sites = self._sites({name: str(heir) for name, heir in doubles.items()})
            warnings.warn(on_doubles(sites), stacklevel=2)
        self.accept(module)

    def accept(self, module: nn.Module) -> None:
        """Take the module as it is, here and in the watches inside."""
        for inner in list(module.modules()):  # those inside would say the same again
            for watch in _watches_on(inner):
                watch.take_stock(inner)

    def take_stock(self, module: nn.Module) -> None:
        """Take the module as it is for what it should be."""
        with _unseen():
            self._module = weakref.ref(module)
            self.inner = [
                watch
                for part in module.modules()
                for watch in _watches_on(part)
                if watch is not self
            ]
            self.layers = {
                name: layer
                for name, layer in module.named_modules()
                if isinstance(layer, (_ConvNd, CoordBranch)) or is_batch_norm(layer)
            }
            self.weights: dict[str, Tensor] = {}
            self.coords: dict[str, Tensor] = {}
            self.samples: dict[str, Tensor] = {}
            for name, layer in self.layers.items():
                weight = weight_of(module, name, layer)
                if weight is None:
                    continue
                self.weights[name] = weight
                coords = layer._parameters.get("coord_weight")
                if coords is not None:
                    self.coords[name] = coords
                if isinstance(layer, (CoordConvNd, CoordBranch)):
                    layer.__dict__["site_name"] = join_names(self.prefix, site_of(name))
                    layer.__dict__["weight_mark"] = mark_of(layer, weight)
                elif isinstance(layer, _ConvNd):
                    rows = rows_of(weight, transposed=layer.transposed, groups=layer.groups)
                    self.samples[name] = sample_of(rows)
            self._glance = Glance.at(module, self.layers)

    def _judge_gone(self, module: nn.Module, gone: Mapping[str, nn.Module]) -> None:
        last = self._last_weights_of(gone)
        lost = [
            name
            for name, (_, coords) in last.items()
            if coords is not None and is_coord_layer(gone[name]) and is_trained(coords)
        ]
        if not lost:
            return
        kernels = {name: kernel_of(gone[name], *weights) for name, weights in last.items()}
        heirs = list(self._heirs(module))
        surely: dict[str, str] = {}
        perhaps: dict[str, str] = {}
        for name in lost:
            for heir in heirs:
                if heir.hides(gone[name]):
                    continue
                kernel = heir.kernel_like(gone[name], *last[name])
                if kernel is None:
                    continue
                whole, carried = inheritance_of(heir, kernel, name, kernels)
                if whole:
                    if not carried:
                        surely[name] = str(heir)
                    break
                if is_published_form(kernel.rows, kernels[name]):
                    break
                if holds_part_of(kernel.rows, kernels[name].rows):
                    perhaps[name] = str(heir)
        if surely:
            raise PatchError(on_heirs(self._sites(surely)))
        if perhaps:
            warnings.warn(on_parts(self._sites(perhaps)), stacklevel=2)

    def _doubles(self, module: nn.Module, present: set[nn.Module]) -> dict[str, Heir]:
        """New modules with the weight of layers that are still there, and may not run any more."""
        heirs = [heir for heir in self._heirs(module) if heir.before is None]
        if not heirs:
            return {}
        last = self._last_weights_of(
            {name: layer for name, layer in self.layers.items() if layer in present}
        )
        kernels = {name: kernel_of(self.layers[name], *last[name]) for name in last}
        found: dict[str, Heir] = {}
        for name, (weight, coords) in last.items():
            layer = self.layers[name]
            if not isinstance(layer, CoordConvNd) or not weight.is_cpu or not is_trained(coords):
                continue
            for heir in heirs:
                # A wrapper holds the layer, or shares its Parameter.
                if heir.tensor is weight or heir.hides(layer) or layer in heir.module.modules():
                    continue
                kernel = heir.kernel_like(layer, weight, coords)
                if kernel is None:
                    continue
                whole, carried = inheritance_of(heir, kernel, name, kernels)
                if whole and not carried:
                    found[name] = heir
                    break
        return found

    def _last_weights_of(
        self, layers: Mapping[str, nn.Module]
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The weight and coordinate weight that layers had last, of those that can be read."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, layer in layers.items():
            weight, coords = map(layer._parameters.get, ("weight", "coord_weight"))
            last: Tensor | None = self.weights.get(name) if weight is None else weight
            if last is not None and is_plain(last) and not is_batch_norm(layer):
                found[name] = (last, self.coords.get(name) if coords is None else coords)
        return found

    def _heirs(self, module: nn.Module) -> Iterator[Heir]:
        """What may have inherited weights: new tensors, and weights that have changed.

        Convolutions with coordinates come first: they may have inherited both.
        """
        named = dict(module.named_modules())
        known = {layer: name for name, layer in self.layers.items()}
        exported = weights_being_exported()
        kept: list[Heir] = []
        for name, inner in sorted(
            named.items(), key=lambda item: not isinstance(item[1], CoordConvNd)
        ):
            if isinstance(inner, CoordBranch) or (inner in known and is_batch_norm(inner)):
                continue
            if inner not in known:
                owner = name.split(".parametrizations.")[0]  # whose weight is computed of it
                for tensor in tensors_of(inner, exported):
                    yield Heir(owner, named[owner], tensor)
            elif isinstance(inner, _ConvNd) and is_plain(inner._parameters.get("weight")):
                mark = inner.__dict__.get("weight_mark")
                before = self.samples.get(known[inner]) if mark is None else mark.weight
                weight = inner._parameters["weight"]
                assert weight is not None
                rows = rows_of(weight, transposed=inner.transposed, groups=inner.groups)
                if before is not None and not _is_same(before, sample_of(rows)):
                    coords = None if mark is None else mark.coords
                    kept.append(Heir(name, inner, weight, before, coords))
        yield from kept

    def _judge_scales(self, *, norm_gone: bool, can_wait: bool) -> None:
        surely: dict[str, str] = {}
        perhaps: dict[str, str] = {}
        for name, layer in self.layers.items():
            mark = layer.__dict__.get("weight_mark")
            module = self._module()
            if mark is None or module is None or not isinstance(layer, (CoordConvNd, CoordBranch)):
                continue
            weight = weight_of(module, name, layer)
            if weight is None or not (weight.is_cpu or can_wait):
                continue
            if not is_trained(layer._parameters.get("coord_weight")):
                continue
            now = mark_of(layer, weight)
            transposed, groups = layout_of(layer)
            rows = rows_of(weight, transposed=transposed, groups=groups)
            scaling = None if now is None else mark.scaling_until(now, rows)
            if scaling is None:
                continue
            if norm_gone or scaling.new_bias:
                surely[name] = f"{scaling.least:.3g} to {scaling.largest:.3g}"
            elif scaling.silent:
                perhaps[name] = f"{scaling.least:.3g} to {scaling.largest:.3g}"
        if surely:
            raise PatchError(on_scales(self._sites(surely)))
        if perhaps:
            warnings.warn(on_silent_scales(self._sites(perhaps)), stacklevel=2)

    def _sites(self, found: Mapping[str, str]) -> dict[str, str]:
        return {join_names(self.prefix, site_of(name)): what for name, what in found.items()}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: a model is being saved, so this is the time to look at it."""
        module = self._module()
        if module is not None:
            self.look_closely(module)
        return {**self._state(), "module": module}

    def _state(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name in ("prefix", "layers", "weights", "coords", "samples")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state.pop("module")
        self.__dict__.update(state)
        self._module = _NOWHERE if module is None else weakref.ref(module)
        self._glance = None
        self._enrol()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        other = memo[id(self)] = _Watch.__new__(_Watch)
        module = memo.get(id(self._module()))  # the copy, if the module is being copied
        other.__setstate__({**copy.deepcopy(self._state(), memo), "module": module})
        return other


class _Race:
    """One forward in which either layers run, or new modules that have their weights.

    Both are there: a re-parametrisation may keep the branches that it does not run any more,
    and a model may get a second network with the weights of its first.

    Raises:
        PatchError: After the forward, if a new module ran, and not the layer that it doubles.
    """

    def __init__(self, watch: _Watch, module: nn.Module, doubles: Mapping[str, Heir]) -> None:
        self.watch, self.doubles = watch, doubles
        self.ran: set[nn.Module] = set()
        runners = [watch.layers[name] for name in doubles] + [h.module for h in doubles.values()]
        self.handles = [each.register_forward_pre_hook(self._note) for each in set(runners)]
        self.handles.append(module.register_forward_hook(self._end, always_call=True))

    def _note(self, module: nn.Module, args: Any) -> None:
        self.ran.add(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        for handle in self.handles:
            handle.remove()
        layers = self.watch.layers
        lost = {
            name: str(heir)
            for name, heir in self.doubles.items()
            if heir.module in self.ran and layers[name] not in self.ran
        }
        if lost:
            raise PatchError(on_heirs(self.watch._sites(lost)))
        if self.ran:
            self.watch.accept(module)


def _nowhere() -> None:
    return None


_NOWHERE: Callable[[], nn.Module | None] = _nowhere


class _BeforeStateDict:
    """Looks before a ``state_dict()``, with which models are saved and exported."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.watch.look(module)


class _OnGraphCopy:
    """Hooks a watch's copy into the copy of a GraphModule, which takes no hooks along."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def __call__(self, made: fx.GraphModule) -> None:
        for hook in list(made._deepcopy_hooks):
            if isinstance(hook, _OnGraphCopy) and hook.watch._module() is made:
                made._deepcopy_hooks.remove(hook)
                hook.watch.attach(made)


def _look_while_compiling(key: str) -> bool:
    """Look while torch.compile, or a strict torch.export, goes through the forward.

    Errors cannot come out of dynamo as they are, so they are warnings here.
    """
    watch = _WATCHES.get(key)
    module = None if watch is None else watch._module()
    if watch is not None and module is not None:
        try:
            watch.look(module)
        except PatchError as error:
            warnings.warn(str(error), stacklevel=2)
    return True


# What torch.compiler.assume_constant_result sets, which would import the compiler: dynamo calls
# the function while it traces, instead of tracing into it, and leaves nothing in the graph.
_look_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def _unseen() -> Iterator[None]:
    """Without gradients, and without anybody who traces or dispatches what is computed."""
    tracing: Any = torch._C
    state = tracing._get_tracing_state()
    tracing._set_tracing_state(None)
    try:
        with torch.no_grad(), _disable_current_modes():
            yield
    finally:
        tracing._set_tracing_state(state)


def _is_same(before: Tensor, now: Tensor) -> bool:
    return before.shape == now.shape and torch.equal(before.to(now), now)
