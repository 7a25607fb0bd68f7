"""Other libraries' folding of batch norms and branches, with the coordinates carried along.

Many models come with code that rewrites them for inference: batch norm goes into the
convolution before it (``model.fuse()``, timm's ``reparameterize_model``), parallel branches
are summed into one kernel (RepVGG, MobileOne, FastViT). Such code knows ``weight`` and
``bias`` and nothing of ``coord_weight``.

The code is run on plain copies with chosen weights, which tells where coordinates go and what
becomes of them; see :mod:`coordconv_patch.folding.probes`.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from coordconv_patch.arguments import check_callable, given
from coordconv_patch.errors import ArgumentError, CoordConvPatchError, PatchError, first_line
from coordconv_patch.folding.method_names import folding_methods_of
from coordconv_patch.folding.probes import Carrier, Probes
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.capture import is_capturing
from coordconv_patch.layers.conversion import convert_, revert_
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.places import Places
from coordconv_patch.left_behind.watch import (
    check_left_behind,
    release_watches_,
    watch_,
    watches_renewed,
)
from coordconv_patch.running.forward_stack import modules_in_forward
from coordconv_patch.running.inputs import check_has_values
from coordconv_patch.running.tracing_gate import tracing_alone
from coordconv_patch.running.untouched import copied

__all__ = ["FoldingMethod", "fold_with", "guard_folding_", "release_folding_"]


class FoldingMethod:
    """Stands in front of a module's own folding method, and carries the coordinates through it.

    ``patch`` puts it on each module instance that holds a patched convolution and whose class
    has such a method, ``unpatch`` takes it away. It copies and pickles with its module.

    Args:
        module: The module whose method it is.
        name: The method's name in the module's class.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, coordinates included; returns what it returns.

        While the module's forward runs, the method is a step of it that only has such a name
        (the fusion of features, say), and is called as it is. So it is with tensors.
        """
        if is_capturing():  # of a forward; and dynamo cannot look at the stack
            return getattr(type(self.module), self.name)(self.module, *args, **kwargs)
        running = self._running_module()
        if running is not None:
            return getattr(type(running), self.name)(running, *args, **kwargs)
        method = getattr(type(self.module), self.name)
        if any(isinstance(leaf, (Tensor, fx.Proxy)) for leaf in pytree.tree_leaves((args, kwargs))):
            return method(self.module, *args, **kwargs)
        # The check looks through all objects, and a model may have hundreds of these methods.
        if sys.getrefcount(self) > _REFERENCES_OF_ONE_HOLDER:
            self._check_not_shared()
        return _fold(self.module, lambda plain: method(plain, *args, **kwargs))

    def _running_module(self) -> nn.Module | None:
        """The module, if its forward, or that of a module around it, is on this thread's stack.

        In the replicas of ``DataParallel``, which share this object, that is the replica.
        """
        for module in modules_in_forward():
            for inner in module.modules():
                if vars(inner).get(self.name) is self:
                    return inner
        return None

    def _check_not_shared(self) -> None:
        """Refuse a call that may have been one of a shallow copy, which shares this object."""
        modules = (each for each in gc.get_objects() if issubclass(type(each), nn.Module))
        if sum(vars(each).get(self.name) is self for each in modules) > 1:
            kind = type(self.module).__name__
            raise PatchError(
                f"{kind}.{self.name}: there is a shallow copy of this {kind}, and which of the two "
                "is to be folded cannot be told: copy it with copy.deepcopy(...), or use "
                f"fold_with(model, lambda plain: plain.{self.name}())"
            )

    def __repr__(self) -> str:
        return f"{type(self.module).__name__}.{self.name}, carrying coordinates"


class _Probe:
    def __call__(self) -> int:
        return sys.getrefcount(self)


_HOLDER = SimpleNamespace(method=_Probe())
_REFERENCES_OF_ONE_HOLDER: int = _HOLDER.method()
"""Python's count of references to a callable object, in its call as an attribute of one object.

A second holder adds one. So does a local name for the method, which is no harm.
"""


def guard_folding_(model: nn.Module) -> None:
    """Put a :class:`FoldingMethod` before every folding method that would lose coordinates."""
    for module in model.modules():
        if isinstance(module, _ConvNd):
            continue
        own = folding_methods_of(module)
        if own and coord_layers(module):
            for name in own:
                if name not in vars(module):  # a user's own replacement stays
                    module.__dict__[name] = FoldingMethod(module, name)


def release_folding_(model: nn.Module) -> None:
    """Inverse of :func:`guard_folding_`."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, FoldingMethod):
                del module.__dict__[name]


def fold_with(model: nn.Module, function: Callable[[Any], Any]) -> Any:
    """What another library's folding function makes of a patched model, coordinates included.

    For functions that fold batch norms into convolutions or sum parallel convolutions, and
    that would leave the coordinates behind::

        folded = fold_with(model, torch.fx.experimental.optimization.fuse)
        conv = fold_with(nn.Sequential(conv, bn), lambda pair: fuse_conv_bn_eval(*pair))

    The function is called several times, on plain copies: it must not depend on chance.
    Methods of the patched model itself (``model.fuse()``, ``block.reparameterize()``) need no
    such call, nor does ``timm.utils.reparameterize_model``, which calls them.

    Args:
        model: A patched model; it is not changed.
        function: Takes the plain model and returns the folded one, or folds in place.

    Returns:
        The folded model, with a coordinate convolution wherever coordinates went.

    Raises:
        PatchError: If the model is not patched, if other code has left coordinates behind, or
            if the function fails or does something with the weights that coordinates cannot follow.
    """
    check_callable("function", function)
    if isinstance(function, type) and issubclass(function, nn.Module):
        raise ArgumentError(f"{given('function', function)}: pass a function that folds a model")
    require_coord_layers(model)
    check_has_values(model)
    check_left_behind(model)
    folded = copied(model, advice="folding works on a copy")
    returned = _fold(folded, functools.partial(_call, function))
    folded = returned if isinstance(returned, nn.Module) else folded
    if not coord_layers(folded):
        raise PatchError(
            f"function returned a {type(folded).__name__} in which no weight depends on a "
            "convolution that has coordinates: return the folded model, or fold in place"
        )
    watch_(folded)
    return folded


def _call(function: Callable[[Any], Any], plain: Any) -> Any:
    """What a user's function returns; a PatchError that names it if it fails."""
    try:
        return function(plain)
    except CoordConvPatchError:
        raise
    except Exception as error:
        raise PatchError(
            f"function failed on a plain copy of the model: {first_line(error)}"
        ) from error


def _fold(model: nn.Module, function: Callable[[Any], Any]) -> Any:
    """Fold a patched module in place; returns what the function returns."""
    layers = coord_layers(model)
    _check_foldable(layers)
    function = tracing_alone()(function)  # which may trace with torch.fx, as torch's own does
    plain = copied(model, advice="folding works on a copy")
    _make_plain_(plain)
    carriers, is_pure = Probes(layers, plain, function).carriers()
    if is_pure:  # it returns a new module and leaves this one alone, so we do too
        model = copied(model, advice="folding works on a copy")
    places = {name: layer.__dict__.get("_places") for name, layer in coord_layers(model).items()}
    with watches_renewed(model):
        _make_plain_(model)
        returned = function(model)
        folded = returned if isinstance(returned, nn.Module) else model
        _carry_(folded, carriers, places)
        guard_folding_(folded)
    return returned


def _carry_(
    folded: nn.Module, carriers: Mapping[str, Carrier], places: Mapping[str, Places | None]
) -> None:
    """Give the convolutions of a folded model their coordinates, in place.

    Args:
        folded: The model.
        carriers: What its convolutions get.
        places: What the layers before asked for their places; a new one asks as all of them.
    """
    shared = next(filter(None, places.values()), None)
    for name, carrier in carriers.items():
        conv = folded.get_submodule(name)
        assert isinstance(conv, _ConvNd)
        convert_(conv, carrier.coords, carrier.padding)
        assert isinstance(conv, CoordConvNd)
        assert conv.coord_weight.shape == carrier.coord_weight.shape  # copy_ would broadcast
        with torch.no_grad():
            conv.coord_weight.copy_(carrier.coord_weight)
        conv.coord_weight.requires_grad_(conv.weight.requires_grad)
        if shared is not None:
            conv.__dict__["_places"] = places.get(name) or shared


def _check_foldable(layers: Mapping[str, CoordLayer]) -> None:
    weights: dict[int, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, CoordBranch):
            reason = "has coordinates in a graph or at chosen calls only"
        elif parametrize.is_parametrized(layer):
            reason = "is parametrized (remove_parametrizations(...) first)"
        elif id(layer.weight) in weights:
            reason = f"shares its weight with {weights[id(layer.weight)]}"
        else:
            weights[id(layer.weight)] = name
            continue
        raise PatchError(
            f"{name} {reason}, so coordinates cannot follow a folding: fold before you patch, or "
            "export with export_onnx(...), which needs none"
        )


def _make_plain_(model: nn.Module) -> None:
    release_folding_(model)
    release_watches_(model)
    for layer in coord_layers(model).values():
        assert isinstance(layer, CoordConvNd)
        revert_(layer)
