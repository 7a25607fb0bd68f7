"""The geometry of a convolution, and how it pads its input.

Coordinates must be padded exactly as the convolution pads its input. torch.nn's
own convolutions say how in their attributes; subclasses may decide it inside
their forward (TensorFlow's "same" padding, say). :func:`padding_of` finds out
by running a subclass's own forward on a small numbered input and looking at
what reaches ``F.conv2d``, so no list of class names is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from coordconv_patch.errors import ArgumentError, PatchError
from coordconv_patch.fields import choice, mapping, truth, whole, wholes
from coordconv_patch.modes import in_mode

__all__ = [
    "CONV_FUNCTIONS",
    "TORCH_CONVS",
    "ConvGeometry",
    "ConvSpy",
    "Padding",
    "PaddingRule",
    "pad_amounts",
    "padding_of",
]

CONV_FUNCTIONS: dict[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
"""torch's convolution by (number of spatial dimensions, transposed)."""

TORCH_CONVS: tuple[type[_ConvNd], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""The convolution classes of torch.nn."""

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
"""What torch.nn's convolutions take as ``padding_mode``."""

PaddingRule = Literal["declared", "same", "fixed"]


@dataclass(frozen=True)
class Padding:
    """How a convolution pads its input.

    Args:
        rule: ``"declared"``: as its ``padding`` and ``padding_mode`` attributes say;
            ``"same"``: zeros, as TensorFlow's SAME padding, from each input's size;
            ``"fixed"``: zeros, by the ``amounts`` given.
        amounts: For ``"fixed"``: ``(before, after)`` per spatial dimension, in pixels.
    """

    rule: PaddingRule = "declared"
    amounts: tuple[tuple[int, int], ...] = ()


DECLARED = Padding()


@dataclass(frozen=True)
class ConvGeometry:
    """The numbers that define a convolution, apart from its weights.

    Spatial tuples are in the order of the tensor's dimensions: (H, W) for images.
    """

    transposed: bool
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: _ConvNd) -> ConvGeometry:
        """The geometry of a convolution module, read from its attributes."""
        return cls(
            transposed=module.transposed,
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel_size=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
            dilation=tuple(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
            output_padding=tuple(module.output_padding) if module.transposed else (),
        )

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions, 1 to 3."""
        return len(self.kernel_size)

    def coord_weight_shape(self, num_channels: int) -> tuple[int, ...]:
        """Shape of the coordinate weight for K = ``num_channels`` coordinate channels.

        ``(C_out, K, *kernel_size)``, or ``(K, C_out, *kernel_size)`` if transposed,
        whatever the number of groups.
        """
        channels = (self.out_channels, num_channels)
        return (*(channels[::-1] if self.transposed else channels), *self.kernel_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready; see :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ConvGeometry:
        """Inverse of :meth:`to_dict`, from parsed JSON, which may hold anything.

        Raises:
            ArgumentError: If a field is missing, unknown, of another type or impossible.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        optional = ("groups", "padding_mode", "output_padding")
        values = mapping(fields, "geometry", [n for n in names if n not in optional], optional)
        kernel_size = wholes(values["kernel_size"], "kernel_size", range(1, 4), low=1)
        each_axis = range(len(kernel_size), len(kernel_size) + 1)
        transposed = truth(values["transposed"], "transposed")
        padding = values["padding"]
        output_padding = values.get("output_padding", ())
        geometry = cls(
            transposed=transposed,
            in_channels=whole(values["in_channels"], "in_channels"),
            out_channels=whole(values["out_channels"], "out_channels"),
            kernel_size=kernel_size,
            stride=wholes(values["stride"], "stride", each_axis, low=1),
            padding=choice(padding, "padding", ("same", "valid"))
            if isinstance(padding, str)
            else wholes(padding, "padding", each_axis),
            dilation=wholes(values["dilation"], "dilation", each_axis, low=1),
            groups=whole(values.get("groups", 1), "groups", low=1),
            padding_mode=choice(values.get("padding_mode", "zeros"), "padding_mode", PADDING_MODES),
            output_padding=wholes(
                output_padding, "output_padding", each_axis if transposed else range(1)
            ),
        )
        if geometry.in_channels % geometry.groups or geometry.out_channels % geometry.groups:
            raise ArgumentError(
                f"groups={geometry.groups} must divide in_channels={geometry.in_channels} and "
                f"out_channels={geometry.out_channels}"
            )
        return geometry

    def __str__(self) -> str:
        """Short form, such as ``3\u219264 7\u00d77 s2 p3``."""
        parts = [
            f"{self.in_channels}\u2192{self.out_channels}",
            "\u00d7".join(map(str, self.kernel_size)),
        ]
        if any(step != 1 for step in self.stride):
            parts.append("s" + _short(self.stride))
        if isinstance(self.padding, str) or any(self.padding):
            parts.append("p" + _short(self.padding))
        if any(step != 1 for step in self.dilation):
            parts.append("d" + _short(self.dilation))
        if self.groups != 1:
            depthwise = self.groups == self.in_channels
            parts.append("depthwise" if depthwise else f"g{self.groups}")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        if self.transposed:
            parts.append("transposed")
        return " ".join(parts)


def _short(values: str | Sequence[int]) -> str:
    if isinstance(values, str):
        return values
    return str(values[0]) if len(set(values)) == 1 else "\u00d7".join(map(str, values))


def pad_amounts(
    padding: Padding,
    input_size: Sequence[Any],
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    declared: str | Sequence[int],
) -> list[tuple[Any, Any]]:
    """Pixels that a convolution adds ``(before, after)`` each spatial dimension.

    Args:
        padding: The convolution's padding rule.
        input_size: Spatial size of its input; may be symbolic.
        kernel_size: Its kernel size; so for ``stride`` and ``dilation``.
        stride: See there.
        dilation: See there.
        declared: Its ``padding`` attribute: ``"valid"``, ``"same"`` or numbers.
    """
    if padding.rule == "fixed":
        return list(padding.amounts)
    if padding.rule == "same":
        return [
            _tensorflow_same(*numbers)
            for numbers in zip(input_size, kernel_size, stride, dilation, strict=True)
        ]
    if declared == "valid":
        return [(0, 0)] * len(input_size)
    if isinstance(declared, str):  # "same": torch puts the odd pixel behind
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(amount), int(amount)) for amount in declared]


def _tensorflow_same(length: Any, kernel: int, stride: int, dilation: int) -> tuple[Any, Any]:
    """TensorFlow's SAME: the output has ceil(length / stride) pixels, the odd one goes behind."""
    # (-length) // stride is -ceil(length / stride), exact for ints and symbols alike.
    total = (-(-length // stride) - 1) * stride + (kernel - 1) * dilation + 1 - length
    if isinstance(total, Tensor):
        total = total.clamp(min=0)
    elif isinstance(total, int):
        total = max(total, 0)
    else:
        total = torch.sym_max(total, 0)
    return total // 2, total - total // 2


def flat_amounts(amounts: Sequence[tuple[Any, Any]]) -> list[Any]:
    """``(before, after)`` per dimension as ``F.pad`` wants it: last dimension first."""
    return list(itertools.chain.from_iterable(reversed(amounts)))


def padding_of(module: _ConvNd) -> Padding:
    """How a convolution module pads its input.

    torch.nn's own forward is known. A subclass with a forward of its own is run
    on small numbered inputs of several sizes, and what reaches the convolution
    is compared with every rule of :class:`Padding`.

    Raises:
        PatchError: If the class does something to its input or output that a
            coordinate branch cannot follow; says what.
    """
    if _forward_is_torchs(module):
        return DECLARED
    class_name = type(module).__name__
    if module.transposed:
        raise PatchError(
            f"{class_name} overrides the forward of a transposed convolution; "
            "patch the module that it stands for instead"
        )
    candidates: set[Padding] | None = None
    for size in _probe_sizes(module):
        fitting = set(_fitting_paddings(module, size))
        candidates = fitting if candidates is None else candidates & fitting
        if not candidates:
            raise PatchError(
                f"the forward of {class_name} pads its input by no rule known here "
                f"(seen at input size {size}); its coordinates could not follow"
            )
    assert candidates
    # Where several rules agree on every probe, the simplest is the class's own statement.
    return min(candidates, key=lambda found: ("declared", "same", "fixed").index(found.rule))


def _forward_is_torchs(module: _ConvNd) -> bool:
    """Whether the module's computation is that of its torch.nn base class."""
    return any(
        isinstance(module, base)
        and getattr(type(module), "forward", None) is base.forward
        and getattr(type(module), "_conv_forward", None) is getattr(base, "_conv_forward", None)
        for base in TORCH_CONVS
    ) and ("forward" not in vars(module))


def _probe_sizes(module: _ConvNd) -> Iterator[tuple[int, ...]]:
    """Input sizes on which the padding rules give different answers."""
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    for extra in (0, 1, 2, 3):
        yield tuple(
            length + step + (extra + dim) % 4
            for dim, (length, step) in enumerate(zip(reach, module.stride, strict=True))
        )


def _fitting_paddings(module: _ConvNd, size: tuple[int, ...]) -> Iterator[Padding]:
    """The padding rules that explain what the module's forward does at one input size."""
    device, dtype = module.weight.device, module.weight.dtype
    numbers = torch.arange(1, math.prod(size) + 1, dtype=torch.float32).reshape(1, 1, *size)
    probe = numbers.expand(1, module.in_channels, *size).to(device, dtype)
    seen, before_conv = _run_probe(module, probe)
    if device.type == "meta":
        raise PatchError(
            f"{type(module).__name__} decides its padding in its own forward, which cannot be "
            "watched on the meta device: load the model on a real device first"
        )
    numeric = {
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "dilation": module.dilation,
    }
    arrived = F.pad(before_conv, flat_amounts(seen))[:, :1]
    reference = probe[:, :1]
    declared = pad_amounts(DECLARED, size, declared=module.padding, **numeric)
    mode = module.padding_mode
    padded = F.pad(reference, flat_amounts(declared), mode="constant" if mode == "zeros" else mode)
    if _same_tensor(padded, arrived):
        yield DECLARED
    same = Padding("same")
    amounts = pad_amounts(same, size, declared=0, **numeric)  # type: ignore[arg-type]
    if _same_tensor(F.pad(reference, flat_amounts(amounts)), arrived):
        yield same
    corner = (arrived[0, 0] == 1).nonzero()
    if len(corner) == 1:
        before = corner[0].tolist()
        found = tuple(
            (front, total - length - front)
            for front, total, length in zip(before, arrived.shape[2:], size, strict=True)
        )
        if all(after >= 0 for _, after in found) and _same_tensor(
            F.pad(reference, flat_amounts(found)), arrived
        ):
            yield Padding("fixed", found)


def _same_tensor(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


class ConvSpy(TorchFunctionMode):
    """While entered, records the calls to a module's convolution function.

    Attributes:
        calls: Positional and keyword arguments, what was returned, and its version then.
    """

    def __init__(self, module: _ConvNd) -> None:
        super().__init__()
        self.functions = (CONV_FUNCTIONS[len(module.kernel_size), module.transposed], torch.conv2d)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor, int]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self.functions:
            self.calls.append((args, dict(kwargs or {}), output, output._version))
        return output


def _run_probe(module: _ConvNd, probe: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """Run the module's forward; return the padding argument and the input of its convolution."""
    class_name = type(module).__name__
    spy = ConvSpy(module)
    # Evaluation mode, so that a parametrization (spectral norm) does not step its estimate.
    with torch.no_grad(), in_mode(module, training=False), spy:
        try:
            output = module.forward(probe)
        except Exception as error:
            raise PatchError(
                f"the forward of {class_name} failed on a probe of shape {tuple(probe.shape)}: "
                f"{error}"
            ) from error
    if len(spy.calls) != 1:
        raise PatchError(
            f"the forward of {class_name} calls {len(spy.calls)} convolutions, not one; "
            "a coordinate branch cannot follow it"
        )
    args, kwargs, result, version = spy.calls[0]
    if output is not result or result._version != version:
        raise PatchError(
            f"the forward of {class_name} changes the convolution's output before it returns it "
            "(a norm or an activation inside?); a branch added behind it would not be a CoordConv"
        )
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call = dict(zip(names, args, strict=False)) | kwargs
    ndim = len(module.kernel_size)
    for name in ("stride", "dilation"):
        if _spread(call.get(name, 1), ndim) != tuple(getattr(module, name)):
            raise PatchError(
                f"the forward of {class_name} convolves with {name}={call.get(name, 1)}, its "
                f"attribute says {getattr(module, name)}"
            )
    if tuple(call["weight"].shape) != tuple(module.weight.shape):
        raise PatchError(f"the forward of {class_name} convolves with a weight of another shape")
    padding = call.get("padding", 0)
    amounts = pad_amounts(
        DECLARED,
        call["input"].shape[2:],
        kernel_size=module.kernel_size,
        stride=module.stride,
        dilation=module.dilation,
        declared=padding if isinstance(padding, str) else _spread(padding, ndim),
    )
    return cast("list[tuple[int, int]]", amounts), call["input"]


def _spread(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """An argument that may be one number for all dimensions, or one for each."""
    return (value,) * ndim if isinstance(value, int) else tuple(value)
