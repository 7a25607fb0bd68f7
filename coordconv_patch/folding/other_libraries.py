"""Other libraries' folding of batch norms and branches, with the coordinates carried along.

Many models come with code that rewrites them for inference: batch norm goes into the
convolution before it (``model.fuse()``, timm's ``reparameterize_model``), parallel branches
are summed into one kernel (RepVGG, MobileOne, FastViT). Such code knows ``weight`` and
``bias`` and nothing of ``coord_weight``.

It need not. Coordinates are further input channels of the convolution, and folding does the
same to the weights of every input channel. So the code is run on copies of the plain model in
which each convolution's coordinate weights stand where the weights of its first input channel
were:

    coord_weight_folded[:, k] = fold(W[:, 0] = coord_weight[:, k])[:, 0] - fold(W[:, 0] = 0)[:, 0]

The difference removes what does not come from the weights, such as the identity branch of a
RepVGG block. This holds for every folding that is affine in the weights and treats input
channels alike; others (a batch norm *before* the convolution, say) are refused.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import keyword
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from coordconv_patch.arguments import check_callable
from coordconv_patch.errors import ArgumentError, PatchError
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.capture import is_capturing
from coordconv_patch.layers.conversion import check_convertible, convert_, revert_
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import Padding
from coordconv_patch.left_behind.watch import (
    check_left_behind,
    release_watches_,
    renewing_watches,
    watch_,
)
from coordconv_patch.running.silence import output_silenced
from coordconv_patch.running.tracing_gate import tracing_alone
from coordconv_patch.running.untouched import LOOK

__all__ = [
    "FoldingMethod",
    "fold_with",
    "guard_folding_",
    "register_folding_method",
    "release_folding_",
]

_FOLDING_METHODS = dict.fromkeys(
    (
        "fuse",
        "fuse_block_residual_branches",  # super-gradients
        "fuse_bn",
        "fuse_conv_bn",
        "fuse_convs",
        "fuse_model",
        "fuse_repvgg_block",  # YOLOv7
        "full_fusion",  # super-gradients
        "partial_fusion",  # super-gradients
        "merge_bn",
        "merge_conv_bn",
        "merge_dilated_branches",
        "merge_kernel",
        "optimize_for_deployment",  # kornia
        "prepare_for_deploy",
        "reparameterize",
        "reparameterize_layer",  # docTR
        "reparameterize_unireplknet",
        "reparametrize",
        "structural_reparam",  # RepLKNet
        "convert_to_deploy",
        "switch_to_deploy",
    )
)
"""Names that libraries give to methods which fold a module for inference; see
:func:`register_folding_method`."""


def register_folding_method(name: str) -> None:
    """Let models that are patched from now on carry coordinates through one more method.

    For a method that folds batch norms or sums branches, of a name that this package does not
    know (it knows ``fuse``, ``reparameterize``, ``switch_to_deploy`` and about twenty more).
    Functions need no name: give them to :func:`fold_with`.

    Args:
        name: The method's name, as ``"to_inference_form"``.

    Raises:
        ArgumentError: If this is not a name, or that of a method which every module has.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ArgumentError(f"name={name!r}: write the method's name, as 'to_inference_form'")
    if hasattr(nn.Module, name) or name == "forward":
        raise ArgumentError(
            f"name={name!r}: every torch.nn.Module has a method of this name, which does not fold; "
            "hand the folding function to fold_with(model, function)"
        )
    _FOLDING_METHODS[name] = None


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
        running = self._running()
        if running is not None:
            return getattr(type(running), self.name)(running, *args, **kwargs)
        method = getattr(type(self.module), self.name)
        if any(isinstance(leaf, (Tensor, fx.Proxy)) for leaf in pytree.tree_leaves((args, kwargs))):
            return method(self.module, *args, **kwargs)
        return _fold(self.module, lambda plain: method(plain, *args, **kwargs))

    def _running(self) -> nn.Module | None:
        """The module, if its forward, or that of a module around it, is on this thread's stack.

        In the replicas of ``DataParallel``, which share this object, that is the replica.
        """
        looked_at: set[int] = set()
        frame = inspect.currentframe()
        while frame is not None:
            module = _module_in_forward(frame)
            if module is not None and id(module) not in looked_at:
                looked_at.add(id(module))
                for inner in module.modules():
                    if vars(inner).get(self.name) is self:
                        return inner
            frame = frame.f_back
        return None

    def __repr__(self) -> str:
        return f"{type(self.module).__name__}.{self.name}, carrying coordinates"


def _module_in_forward(frame: FrameType) -> nn.Module | None:
    """The module whose forward a frame runs; ``None`` if it runs something else."""
    code = frame.f_code
    if code.co_argcount == 0 or (code.co_name != "forward" and code is not _CALL):
        return None
    module = frame.f_locals.get(code.co_varnames[0])
    return module if isinstance(module, nn.Module) else None


_CALL = nn.Module._call_impl.__code__


def guard_folding_(model: nn.Module) -> None:
    """Put a :class:`FoldingMethod` before every folding method that would lose coordinates."""
    names = tuple(_FOLDING_METHODS)
    for module in model.modules():
        if isinstance(module, _ConvNd):
            continue
        own = [name for name in names if callable(getattr(type(module), name, None))]
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
            if the function does something with the weights that coordinates cannot follow.
    """
    check_callable("function", function)
    require_coord_layers(model)
    check_left_behind(model)
    with LOOK:
        folded = copy.deepcopy(model)
    returned = _fold(folded, function)
    folded = returned if isinstance(returned, nn.Module) else folded
    watch_(folded)
    return folded


@dataclass(frozen=True)
class _Carrier:
    """A convolution of the folded model that has to carry coordinates."""

    coords: Coordinates
    padding: Padding
    coord_weight: Tensor


def _fold(model: nn.Module, function: Callable[[Any], Any]) -> Any:
    """Fold a patched module in place; returns what the function returns."""
    layers = coord_layers(model)
    _check_foldable(layers)
    function = _traced_alone(function)
    carriers, is_pure = _Probes(model, function).carriers()
    if is_pure:  # it returns a new module and leaves this one alone, so we do too
        model = copy.deepcopy(model)
    with renewing_watches(model):
        _make_plain_(model)
        returned = function(model)
        folded = returned if isinstance(returned, nn.Module) else model
        _carry_(folded, carriers)
        guard_folding_(folded)
    return returned


def _carry_(folded: nn.Module, carriers: Mapping[str, _Carrier]) -> None:
    """Give the convolutions of a folded model their coordinates, in place."""
    for name, carrier in carriers.items():
        conv = folded.get_submodule(name)
        assert isinstance(conv, _ConvNd)
        convert_(conv, carrier.coords, carrier.padding)
        assert isinstance(conv, CoordConvNd)
        assert conv.coord_weight.shape == carrier.coord_weight.shape  # copy_ would broadcast
        with torch.no_grad():
            conv.coord_weight.copy_(carrier.coord_weight)
        conv.coord_weight.requires_grad_(conv.weight.requires_grad)


def _traced_alone(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A folding function that may trace the model with torch.fx, as torch's own does."""

    def traced_alone(model: Any) -> Any:
        with tracing_alone():
            return function(model)

    return traced_alone


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


class _Probes:
    """Runs of a folding function on plain copies with chosen weights."""

    def __init__(self, model: nn.Module, function: Callable[[Any], Any]) -> None:
        self.function = function
        layers = coord_layers(model)
        self.coords = {name: layer.coords for name, layer in layers.items()}
        self.coord_weights = {
            name: layer.coord_weight.detach().cpu().double() for name, layer in layers.items()
        }
        self.plain = copy.deepcopy(model)
        _make_plain_(self.plain)
        self.plain = self.plain.cpu().double()

    def run(self, channels: dict[str, Tensor], *, last: bool = False) -> tuple[nn.Module, bool]:
        """The folded model if one input channel of the convolutions had these weights.

        Args:
            channels: By site, of shape ``(C_out, *kernel_size)``; zero where not named, as
                are the weights of all other input channels.
            last: Take the last input channel of each group, not the first.

        Returns:
            The folded model, and whether it is another object than the one that was folded.
        """
        with _NewTensorsInFloat64():
            folded, is_pure = self._run(channels, last)
        if any(tensor.dtype is not torch.float64 for _, tensor in _tensors(folded)):
            # Made by torch.Tensor(...), perhaps, which no mode sees.
            with _default_float64():
                folded, is_pure = self._run(channels, last)
        return folded, is_pure

    @torch.no_grad()
    def _run(self, channels: dict[str, Tensor], last: bool) -> tuple[nn.Module, bool]:
        probe = copy.deepcopy(self.plain)
        for name in self.coords:
            conv = probe.get_submodule(name)
            assert isinstance(conv, _ConvNd)
            conv.weight.zero_()
            if name in channels:
                place = _input_channel(conv, conv.weight, last=last)
                place.copy_(channels[name].reshape(place.shape))
        with output_silenced(logging.CRITICAL):  # it is to say it once, when it folds the model
            returned = self.function(probe)
        folded = returned if isinstance(returned, nn.Module) else probe
        return folded, folded is not probe

    def carriers(self) -> tuple[dict[str, _Carrier], bool]:
        """The convolutions of the folded model that carry coordinates, by name.

        Also whether the function returns a new module.
        """
        zero, is_pure = self.run({})
        found: dict[str, _Carrier] = {}
        for coords in dict.fromkeys(self.coords.values()):
            for name, padding in self._reached(coords, zero).items():
                if name in found:
                    raise PatchError(
                        f"folding would merge convolutions with different coordinates ({coords} "
                        f"and {found[name].coords}) into {name or 'one'}: patch them alike"
                    )
                found[name] = _Carrier(coords, padding, torch.empty(0))
            for name, weight in self._coord_weights(coords, zero).items():
                if name in found and found[name].coords == coords:
                    found[name] = replace(found[name], coord_weight=weight)
        return found, is_pure

    def _reached(self, coords: Coordinates, zero: nn.Module) -> dict[str, Padding]:
        """Where the coordinates of a convention go; checks that folding is affine."""
        generator = torch.Generator().manual_seed(0)
        noise = {
            name: torch.randn(_input_channel(conv, conv.weight).shape, generator=generator)
            for name, conv in self._convs(coords).items()
        }
        once, _ = self.run(noise)
        # Twice the weights, in another input channel: both must make no difference.
        twice, _ = self.run({name: values * 2 for name, values in noise.items()}, last=True)
        reached: dict[str, Padding] = {}
        before, after, doubled = (dict(_tensors(folded)) for folded in (zero, once, twice))
        for name, tensor in before.items():
            change = after[name] - tensor
            if change.any():
                owner, _, own_name = name.rpartition(".")
                conv = zero.get_submodule(owner)
                if not isinstance(conv, _ConvNd) or own_name != "weight":
                    raise PatchError(
                        f"folding makes {name} depend on a convolution's weight, which "
                        f"coordinates cannot follow{_INSTEAD}"
                    )
                _check_followed(name, conv, change, doubled[name] - tensor)
                _check_not_for_quantization(zero, owner)
                reached[owner] = check_convertible(conv)
        return reached

    def _coord_weights(self, coords: Coordinates, zero: nn.Module) -> dict[str, Tensor]:
        """The folded coordinate weight of every convolution of the folded model."""
        channels: dict[str, list[Tensor]] = {}
        transposed: dict[str, bool] = {}
        convs = self._convs(coords)
        for k in range(max(coords.num_channels(len(conv.kernel_size)) for conv in convs.values())):
            values = {}
            for name, conv in convs.items():
                if k < coords.num_channels(len(conv.kernel_size)):  # a Conv1d has fewer
                    dim = 0 if conv.transposed else 1
                    values[name] = self.coord_weights[name].select(dim, k)
            folded, _ = self.run(values)
            for name, conv in folded.named_modules():
                if isinstance(conv, _ConvNd) and k < coords.num_channels(len(conv.kernel_size)):
                    before = zero.get_parameter(f"{name}.weight".lstrip("."))
                    change = _input_channel(conv, conv.weight.detach() - before.detach())
                    channel = change.reshape(conv.out_channels, *conv.kernel_size)
                    channels.setdefault(name, []).append(channel)
                    transposed[name] = conv.transposed
        return {
            name: torch.stack(parts, 0 if transposed[name] else 1)
            for name, parts in channels.items()
        }

    def _convs(self, coords: Coordinates) -> dict[str, _ConvNd]:
        found: dict[str, _ConvNd] = {}
        for name, of in self.coords.items():
            conv = self.plain.get_submodule(name)
            assert isinstance(conv, _ConvNd)
            if of == coords:
                found[name] = conv
        return found


_INSTEAD = ": export with export_onnx(...), which needs no folding"


def _check_followed(name: str, conv: _ConvNd, change: Tensor, doubled_in_last: Tensor) -> None:
    """Check that a folded weight follows the unfolded ones as coordinates can.

    Args:
        name: The weight's name, for the message.
        conv: The convolution whose weight it is.
        change: How it changes with noise in the first input channels.
        doubled_in_last: How it changes with twice that noise in the last ones.
    """
    in_first = _input_channel(conv, change)
    in_last = _input_channel(conv, doubled_in_last, last=True)
    if not torch.allclose(in_last, 2 * in_first, rtol=1e-9, atol=1e-12):
        raise PatchError(
            f"folding is not linear in the weights that end up in {name}, or does not treat all "
            "input channels alike (a batch norm before the convolution, perhaps), so coordinates "
            f"cannot follow it{_INSTEAD}"
        )
    if change.count_nonzero() != in_first.count_nonzero():
        raise PatchError(
            f"folding mixes the input channels of {name}, so coordinates cannot follow it{_INSTEAD}"
        )


def _check_not_for_quantization(folded: nn.Module, name: str) -> None:
    """Check that a convolution is not inside a module that torch.ao will replace as a whole."""
    parent = type(folded.get_submodule(name.rpartition(".")[0]))
    if name and parent.__module__.startswith("torch.ao."):
        raise PatchError(
            f"folding makes a {parent.__name__} of {name}, whose quantization knows nothing of "
            "coordinates: fold(model), then quantize its torch.export program (PyTorch 2 export)"
        )


def _input_channel(conv: _ConvNd, weight: Tensor, *, last: bool = False) -> Tensor:
    """A view of the weights with which each output channel sees one input channel of its group.

    Args:
        conv: The convolution.
        weight: A tensor of its weight's shape.
        last: The last input channel of the group, not the first.

    Returns:
        Shape ``(C_out, *kernel_size)``, for transposed convolutions
        ``(groups, C_out / groups, *kernel_size)``.
    """
    per_group = conv.in_channels // conv.groups
    index = per_group - 1 if last else 0
    return weight[index::per_group] if conv.transposed else weight[:, index]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor.detach()


_FACTORIES = frozenset(
    {
        torch.empty,
        torch.empty_strided,
        torch.eye,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randn,
        torch.zeros,
    }
)
"""What makes new tensors of the default dtype, whatever its other arguments are."""

_CONVERSIONS = frozenset({torch.arange, torch.full, torch.scalar_tensor, torch.tensor})
"""What makes new tensors of the default dtype where its arguments are floats."""


class _NewTensorsInFloat64(TorchFunctionMode):
    """While entered, new tensors of this thread get float64 where no dtype is asked for.

    A difference of float32 weights would lose digits. torch's default dtype is one for all
    threads, and would change what their models compute.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        # None is what torch.nn's layers pass on for the default.
        if given.get("dtype") is None and "out" not in given:
            if func in _FACTORIES:
                given["dtype"] = torch.float64
            elif func in _CONVERSIONS:
                made = func(*args, **given)
                if made.dtype is not torch.get_default_dtype():
                    return made
                given["dtype"] = torch.float64
        return func(*args, **given)


@contextlib.contextmanager
def _default_float64() -> Iterator[None]:
    """As :class:`_NewTensorsInFloat64`, for whatever makes a tensor, but in every thread."""
    with LOOK:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
