"""Find out how a convolution module pads its input.

Coordinates must be padded exactly as the convolution pads its input. torch.nn's own
convolutions say how in their attributes. A subclass may decide it inside its forward
(TensorFlow's "same" padding, say), and so may a method that somebody put on one instance
(seamless tiling of diffusion models). :func:`padding_of` runs such a module's own forward on
small numbered images and looks at what reaches ``F.conv2d``, so no list of classes is needed.

Every padding that is known here picks an index along each axis: pixel (i, j) of the padded
image is pixel (f(i), g(j)) of the image, or zero. So the probe holds an image whose pixels
are their own index along H, and one for W; what arrives spells f and g.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.geometry import (
    CONV_FUNCTIONS,
    DECLARED,
    TORCH_CONVS,
    ConvGeometry,
    Padding,
    each_axis,
    flat_amounts,
    ndim_of,
    pad_amounts,
    pad_by_axis,
    pad_modes,
)
from coordconv_patch.running.function_modes import own_modes_set_aside
from coordconv_patch.running.untouched import in_mode, state_restored

__all__ = ["TORCHS_OWN", "ConvSpy", "padding_of", "pads_as_torch", "pads_by"]


def _if_torchs(method: Any) -> Any:
    """A method if torch wrote it; ``None`` if somebody had replaced it before."""
    code = getattr(method, "__code__", None)
    is_torchs = code is not None and code.co_filename == _ConvNd.extra_repr.__code__.co_filename
    return method if is_torchs else None


TORCHS_OWN = {
    base: (_if_torchs(base.forward), _if_torchs(base._conv_forward)) for base in TORCH_CONVS
}
"""The ``forward`` and the ``_conv_forward`` that torch wrote for each of its convolutions."""

_MOST_NUMBERS = 251
"""Numbers in an image of any size: as many as bfloat16 holds exactly, and a prime."""

_MODES = ("zeros", "circular", "reflect", "replicate")


def padding_of(module: _ConvNd, forward: Callable[..., Tensor] | None = None) -> Padding:
    """How a convolution module pads its input.

    Args:
        module: The module.
        forward: Its forward, bound to it; ``None``: that which a call of the module runs.

    Raises:
        PatchError: If the module does something to its input or output that a coordinate
            branch cannot follow; says what.
    """
    forward = module.forward if forward is None else forward
    if pads_as_torch(module, forward):
        return _declared_padding(module)
    if module.transposed:
        raise PatchError(
            f"{_whose(module)} overrides the forward of a transposed convolution; "
            "patch the module that it stands for instead"
        )
    with _looked_at(module):
        return min(_candidates(module, forward), key=_simplicity)


def pads_by(
    module: _ConvNd, forward: Callable[..., Tensor], size: tuple[int, ...], padding: Padding
) -> bool:
    """Whether a module pads an input of one size by a padding, in the mode that it is in.

    Args:
        module: The module.
        forward: Its forward, bound to it.
        size: Spatial size of the input.
        padding: The padding.

    Raises:
        PatchError: If the forward fails, or does what no coordinate branch can follow.
    """
    numbers: Any = 0
    for axis, (length, factor) in enumerate(zip(size, (1, 7, 31), strict=False)):
        line = torch.arange(length) * factor
        numbers = numbers + line.reshape(-1, *(1,) * (len(size) - 1 - axis))
    with _looked_at(module):
        weight = module.weight
        probe = (numbers % _MOST_NUMBERS + 1).to(weight.device, weight.dtype).expand(1, 1, *size)
        arrived = _what_arrives(module, forward, probe.expand(-1, module.in_channels, *size))
    geometry = ConvGeometry.of(module)
    modes = pad_modes(padding, geometry)
    expected = pad_by_axis(probe, pad_amounts(padding, size, geometry), modes)
    return expected.shape[2:] == arrived.shape[2:] and bool((expected == arrived).all())


@contextmanager
def _looked_at(module: _ConvNd) -> Iterator[None]:
    """While entered, a module's forward can be watched; then everything is as it was.

    The module keeps its mode, because it may pad by that; its parts are in evaluation mode, so
    that a parametrization (spectral norm) does not step its estimate.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # whose tensors know no versions
        stack.enter_context(state_restored(module))
        for part in filter(None, module._modules.values()):
            stack.enter_context(in_mode(part, training=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(own_modes_set_aside())
        device = module.weight.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _candidates(module: _ConvNd, forward: Callable[..., Tensor]) -> set[Padding]:
    """The paddings that explain what a module does at every probe's size; never empty."""
    candidates: set[Padding] | None = None
    for size in _probe_sizes(module):
        fitting = set(_fitting_paddings(module, forward, size))
        candidates = fitting if candidates is None else candidates & fitting
        if not candidates:
            raise PatchError(
                f"the forward of {_whose(module)} pads its input by no rule known here "
                f"(seen at input size {size}); its coordinates could not follow"
            )
    assert candidates
    return candidates


def _simplicity(padding: Padding) -> int:
    """Where several rules agree on every probe, the simplest is the class's own statement.

    Next comes the rule of whole libraries; for other modes, numbers that no size changes.
    """
    order = ("declared", "fixed", "same") if padding.modes else ("declared", "same", "fixed")
    return order.index(padding.rule)


def _whose(module: _ConvNd) -> str:
    """Who decides how a module pads: its class, or a method that was put on the instance."""
    name = type(module).__name__
    own = sorted(method for method in vars(module) if callable(getattr(type(module), method, None)))
    return f"{name} (with {', '.join(own)} replaced on the instance)" if own else name


def pads_as_torch(module: _ConvNd, forward: Callable[..., Tensor]) -> bool:
    """Whether a module computes what its torch.nn base class does, so that it needs no probe."""
    return any(
        isinstance(module, base)
        and own_forward is not None
        and own_conv_forward is not None
        and _is_bound(forward, own_forward, module)
        and getattr(type(module), "_conv_forward", None) is own_conv_forward
        and _is_bound(vars(module).get("_conv_forward"), own_conv_forward, module)
        for base, (own_forward, own_conv_forward) in TORCHS_OWN.items()
    )


def _is_bound(method: Any, function: Any, module: _ConvNd) -> bool:
    """Whether a method is a function bound to a module; ``None`` stands for the class's own."""
    if method is None:
        return True
    return (
        isinstance(method, MethodType) and method.__func__ is function and method.__self__ is module
    )


def _declared_padding(module: _ConvNd) -> Padding:
    """How torch.nn's own forward pads: by ``padding``, in another mode by a list made of it.

    The list is made when the module is; whoever changes one of the two later may leave the
    other behind.
    """
    if module.transposed or str(module.padding_mode) in ("zeros", "constant"):
        return DECLARED
    geometry = ConvGeometry.of(module)
    ndim = geometry.ndim
    flat = [int(amount) for amount in module._reversed_padding_repeated_twice]
    if len(flat) != 2 * ndim:
        raise PatchError(
            f"its _reversed_padding_repeated_twice is {flat}; write two numbers for each of its "
            f"{ndim} spatial dimensions, the last dimension first"
        )
    amounts = tuple(zip(flat[::2], flat[1::2], strict=True))[::-1]
    if list(amounts) == pad_amounts(DECLARED, (0,) * ndim, geometry):
        return DECLARED
    return _padding("fixed", amounts, (module.padding_mode,) * ndim)


def _padding(rule: Any, amounts: tuple[tuple[int, int], ...], modes: tuple[str, ...]) -> Padding:
    """A padding in its one spelling: nothing is said where zeros are meant."""
    return Padding(rule, amounts, modes if any(mode != "zeros" for mode in modes) else ())


def _probe_sizes(module: _ConvNd) -> Iterator[tuple[int, ...]]:
    """Input sizes on which the padding rules give different answers."""
    geometry = ConvGeometry.of(module)
    reach = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, geometry.kernel_size, strict=True)]
    for extra in (0, 1, 2, 3):
        yield tuple(
            length + step + (extra + dim) % 4
            for dim, (length, step) in enumerate(zip(reach, geometry.stride, strict=True))
        )


def _fitting_paddings(
    module: _ConvNd, forward: Callable[..., Tensor], size: tuple[int, ...]
) -> Iterator[Padding]:
    """The paddings that explain what a module's forward does at one input size."""
    probe = _numbered_images(size).to(module.weight.device, module.weight.dtype)
    images = probe.expand(-1, module.in_channels, *size)
    arrived = torch.cat([_what_arrives(module, forward, image[None]) for image in images])
    if module.weight.device.type == "meta":
        raise PatchError(
            f"{_whose(module)} decides its padding in its own forward, which cannot be "
            "watched on the meta device: load the model on a real device first"
        )
    if not torch.equal(arrived, arrived[:, :1].expand_as(arrived)):
        return
    arrived = arrived[:, :1]
    along_axes = [
        list(_paddings_along(_indices(arrived[axis, 0], axis), length))
        for axis, length in enumerate(size)
    ]
    geometry = ConvGeometry.of(module)
    same = tuple(pad_amounts(Padding("same"), size, geometry))
    declared = tuple(pad_amounts(DECLARED, size, geometry))
    declared_mode = str(module.padding_mode).replace("constant", "zeros")
    for found in itertools.product(*along_axes):
        amounts = tuple((axis.before, axis.after) for axis in found)
        modes = tuple(axis.mode for axis in found)
        if not torch.equal(pad_by_axis(probe, amounts, modes), arrived):
            continue
        padded = [mode for mode, pair in zip(modes, amounts, strict=True) if any(pair)]
        if amounts == declared and all(mode == declared_mode for mode in padded):
            yield DECLARED
        if amounts == same:
            # Where nothing is added at this size, another size may tell the mode.
            free = [(m,) if any(pair) else _MODES for m, pair in zip(modes, amounts, strict=True)]
            for each in itertools.product(*free):
                yield _padding("same", (), each)
        yield _padding("fixed", amounts, modes)


def _numbered_images(size: tuple[int, ...]) -> Tensor:
    """One image an axis, whose pixels are numbered from 1 along it: shape (ndim, 1, *size)."""
    images = []
    for axis, length in enumerate(size):
        line = torch.arange(1.0, length + 1)
        images.append(line.reshape(-1, *(1,) * (len(size) - 1 - axis)).expand(size))
    return torch.stack(images).unsqueeze(1)


class _AxisPadding(NamedTuple):
    """How one axis is padded."""

    before: int
    after: int
    mode: str


def _indices(image: Tensor, axis: int) -> list[int] | None:
    """The index that each position along an axis got its pixels from, -1 for zeros."""
    lines = image.movedim(axis, 0).reshape(image.shape[axis], -1)
    largest = lines.amax(1)
    if not bool(((lines == largest.unsqueeze(1)) | (lines == 0)).all()):
        return None
    return [int(number) - 1 for number in largest.tolist()]


def _paddings_along(indices: list[int] | None, length: int) -> Iterator[_AxisPadding]:
    """The paddings of an axis of a length that give these indices."""
    if indices is None:
        return
    total = len(indices) - length
    for before in range(total + 1):
        for mode in _MODES if total else ("zeros",):
            if _padded_indices(length, before, total - before, mode) == indices:
                yield _AxisPadding(before, total - before, mode)


def _padded_indices(length: int, before: int, after: int, mode: str) -> list[int]:
    """Where ``F.pad`` takes each pixel of an axis from, -1 for zeros."""
    positions = range(-before, length + after)
    if mode == "zeros":
        return [index if 0 <= index < length else -1 for index in positions]
    if mode == "circular":
        return [index % length for index in positions]
    if mode == "replicate":
        return [min(max(index, 0), length - 1) for index in positions]
    last = length - 1
    return [last - abs(last - abs(index)) for index in positions]


class ConvSpy(TorchFunctionMode):
    """While entered, records the calls to a module's convolution function.

    Attributes:
        calls: Positional and keyword arguments, what was returned, and its version then.
    """

    def __init__(self, module: _ConvNd) -> None:
        super().__init__()
        self.functions = (CONV_FUNCTIONS[ndim_of(module), module.transposed], torch.conv2d)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self.functions:
            self.calls.append((args, dict(kwargs or {}), output, output._version))
        return output


def _what_arrives(module: _ConvNd, forward: Callable[..., Tensor], probe: Tensor) -> Tensor:
    """What a module's convolution computes on when the module gets a probe, padding included."""
    whose, expected = _whose(module), ConvGeometry.of(module)
    spy = ConvSpy(module)
    with spy:
        try:
            output = forward(probe)
        except Exception as error:
            raise PatchError(
                f"the forward of {whose} failed on a probe of shape {tuple(probe.shape)}: {error}"
            ) from error
    if len(spy.calls) != 1:
        raise PatchError(
            f"the forward of {whose} calls {len(spy.calls)} convolutions, not one; "
            "a coordinate branch cannot follow it"
        )
    args, kwargs, result, version = spy.calls[0]
    if output is not result or result._version != version:
        raise PatchError(
            f"the forward of {whose} changes the convolution's output before it returns it "
            "(a norm or an activation inside?); a branch added behind it would not be a CoordConv"
        )
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call = dict(zip(names, args, strict=False)) | kwargs
    ndim = expected.ndim
    for name in ("stride", "dilation"):
        if each_axis(call.get(name, 1), ndim) != getattr(expected, name):
            raise PatchError(
                f"the forward of {whose} convolves with {name}={call.get(name, 1)}, its "
                f"attribute says {getattr(module, name)}"
            )
    if tuple(call["weight"].shape) != tuple(module.weight.shape):
        raise PatchError(f"the forward of {whose} convolves with a weight of another shape")
    padding = call.get("padding", 0)
    declared = padding if isinstance(padding, str) else each_axis(padding, ndim)
    geometry = dataclasses.replace(expected, padding=declared)
    amounts = pad_amounts(DECLARED, call["input"].shape[2:], geometry)
    return F.pad(call["input"], flat_amounts(amounts))
