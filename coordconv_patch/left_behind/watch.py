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
- It is gone, and channels of its weight are in a new convolution with other channels (wider, for
  grey images) or in another order: a *warning*, since it may have been changed on purpose.
- It is gone, and nothing has its weight (a new head, a branch removed), or it is inside a wrapper
  (LoRA, FSDP, checkpointing): nothing.
- Its output channels were scaled, its coordinate weight was not, and a batch norm is gone or a
  bias is new: an *error*, a batch norm was folded in.
- Its weight changed otherwise and its coordinate weight did not, a batch norm is gone and a bias is
  new: an *error*, branches were merged into it. If it had a bias: through ``.data`` a *warning*.
- Either of these since the last step of a training, which moved the coordinates: a *warning*, since
  they may have been scaled and summed alike.
- Its output channels were scaled, but batch norms and bias are as they were: through ``.data`` a
  *warning*, since it may be the scale of the input; by an operation that autograd knows, nothing.
- It is a branch of chosen calls, and the hook that adds it to them is gone: an *error*.
- Its weight changed in any other way (training, weight decay, pruning, loading): nothing.

An error comes again at each look until the model is mended, unpatched, or the loss is accepted
with :func:`forget_left_behind_`; a warning comes once, or at each pickle, which changes nothing.

What is not seen: a model built anew from the weights alone (there is nothing of this package in
it), a GraphModule that somebody's symbolic trace made of the whole model, or one that went
through pickle, which keeps no hooks; a change of ``.data`` of a model inside another one that is
compiled; what is outside of the watched parts where a method of the model is called and not the
model; a fold through ``.data`` between the last step of a training and the first look, into a
convolution that had a bias or is called by a function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.graphs.functional import join_names
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.call_hooks import branches_without_hook
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.left_behind.verdicts import check_hooks
from coordconv_patch.left_behind.watch_hook import Watch, watches_on
from coordconv_patch.running.inputs import check_is_module

__all__ = [
    "check_left_behind",
    "dismiss_",
    "forget_left_behind_",
    "is_watched",
    "release_watches_",
    "watch_",
    "watches_renewed",
]


def watch_(model: nn.Module, prefix: str = "") -> None:
    """Put watches on a patched model and its parts, in place of those that it had.

    Args:
        model: The model.
        prefix: Its own qualified name, for messages.
    """
    release_watches_(model)
    for name, part in reversed(list(_parts(model))):  # each finds those further in
        Watch(join_names(prefix, name), part).attach(part)


def release_watches_(model: nn.Module) -> None:
    """Inverse of :func:`watch_`, for all the modules in a model."""
    for module in model.modules():
        for watch in watches_on(module):
            watch.detach(module)


def is_watched(model: nn.Module) -> bool:
    """Whether a model, or a module in it, has a watch on it."""
    return any(watches_on(module) for module in model.modules())


def dismiss_(model: nn.Module) -> None:
    """Tell watches further out that a model's coordinate layers are about to be taken off."""
    for layer in coord_layers(model).values():
        if isinstance(layer, CoordBranch):  # others become plain convolutions, which shows
            layer.__dict__["is_dismissed"] = True


@contextmanager
def watches_renewed(model: nn.Module) -> Iterator[None]:
    """Let a block rewrite a model that carries the coordinates along; watches see the outcome."""
    prefixes = [watch.inventory.prefix for watch in watches_on(model)]
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
    check_hooks(model)  # whoever took those away may have taken the watches too
    for module in list(model.modules()):
        for watch in watches_on(module):
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
    for module in model.modules():
        for branch in branches_without_hook(module):
            branch.__dict__["is_dismissed"] = True
    for module in reversed(list(model.modules())):
        for watch in watches_on(module):
            watch.take_stock(module)
    return model


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, and its parts down to where its coordinate layers part ways, with names."""
    if isinstance(model, CoordLayer) or not coord_layers(model):
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
