"""The geometry of a convolution, and the ways in which it may pad its input.

Which of these ways a module takes is found out in :mod:`coordconv_patch.layers.padding_probe`.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.errors import ArgumentError, excerpt
from coordconv_patch.files.fields import choice, mapping, truth, whole, wholes

__all__ = [
    "CONV_FUNCTIONS",
    "TORCH_CONVS",
    "Call",
    "ConvGeometry",
    "Convolution",
    "Padding",
    "PaddingRule",
    "each_axis",
    "ndim_of",
    "output_padding_between",
    "pad_amounts",
    "pad_by_axis",
    "pad_modes",
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


class Convolution(Protocol):
    """What torch.nn's convolutions and :class:`ConvGeometry` both tell of themselves."""

    @property
    def transposed(self) -> bool: ...
    @property
    def kernel_size(self) -> tuple[int, ...]: ...
    @property
    def stride(self) -> tuple[int, ...]: ...
    @property
    def padding(self) -> str | tuple[int, ...]: ...
    @property
    def dilation(self) -> tuple[int, ...]: ...
    @property
    def padding_mode(self) -> str: ...


@dataclass(frozen=True)
class Padding:
    """How a convolution pads its input.

    Args:
        rule: ``"declared"``: as its ``padding`` and ``padding_mode`` attributes say;
            ``"same"``: as TensorFlow's SAME padding, from each input's size;
            ``"fixed"``: by the ``amounts`` given.
        amounts: For ``"fixed"``: ``(before, after)`` per spatial dimension, in pixels.
        modes: For ``"same"`` and ``"fixed"``: the padding mode of each spatial dimension, in
            torch.nn's words (``"zeros"``, ``"circular"``, ...); ``()``: zeros everywhere.
    """

    rule: PaddingRule = "declared"
    amounts: tuple[tuple[int, int], ...] = ()
    modes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, fields: object) -> Padding:
        """A padding from parsed JSON (of ``dataclasses.asdict``), which may hold anything.

        Raises:
            ArgumentError: If a field is missing, unknown, of another type or impossible.
        """
        values = mapping(fields, "rule", ("rule", "amounts", "modes"))
        amounts, modes = values["amounts"], values["modes"]
        for name, value in (("amounts", amounts), ("modes", modes)):
            if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
                raise ArgumentError(f"{name} must be a list of at most 3, not {excerpt(value)}")
        pairs = [wholes(pair, "amounts", range(2, 3)) for pair in amounts]
        rule: Any = choice(values["rule"], "rule", get_args(PaddingRule))
        return cls(
            rule,
            tuple((before, after) for before, after in pairs),
            tuple(choice(mode, "modes", PADDING_MODES) for mode in modes),
        )


_MOST_DIMENSIONS = 3
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
        """The geometry of a convolution module, read from its attributes.

        These may be one number for all dimensions, which torch convolves by as well.
        """
        ndim, padding = ndim_of(module), module.padding
        return cls(
            transposed=module.transposed,
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel_size=each_axis(module.kernel_size, ndim),
            stride=each_axis(module.stride, ndim),
            padding=padding if isinstance(padding, str) else each_axis(padding, ndim),
            dilation=each_axis(module.dilation, ndim),
            groups=module.groups,
            padding_mode=module.padding_mode,
            output_padding=each_axis(module.output_padding, ndim) if module.transposed else (),
        )

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions, 1 to 3."""
        return len(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the convolution's own weight, as torch has it."""
        channels = (self.out_channels, self.in_channels // self.groups)
        if self.transposed:
            channels = (self.in_channels, self.out_channels // self.groups)
        return (*channels, *self.kernel_size)

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


@dataclass(frozen=True)
class Call:
    """One execution of a convolution, as seen on example inputs.

    Sizes are spatial: ``(H, W)`` for images, in pixels.
    """

    input_size: tuple[int, ...]
    output_size: tuple[int, ...]


def ndim_of(module: _ConvNd) -> int:
    """Spatial dimensions of a convolution module: its ``kernel_size`` may be one number."""
    for base, ndim in zip(TORCH_CONVS, (1, 2, 3, 1, 2, 3), strict=True):
        if isinstance(module, base):
            return ndim
    return len(module.kernel_size)


def each_axis(value: Any, ndim: int) -> tuple[int, ...]:
    """A convolution's number, which may be one for all dimensions or one for each.

    Args:
        value: An integer, NumPy's too, or a sequence of them, of one or of ``ndim``.
        ndim: Number of spatial dimensions.
    """
    try:
        return (operator.index(value),) * ndim
    except TypeError:
        values = tuple(map(operator.index, value))
    return values * ndim if len(values) == 1 else values


def _short(values: str | Sequence[int]) -> str:
    if isinstance(values, str):
        return values
    return str(values[0]) if len(set(values)) == 1 else "\u00d7".join(map(str, values))


def pad_amounts(
    padding: Padding, input_size: Sequence[Any], convolution: Convolution
) -> list[tuple[Any, Any]]:
    """Pixels that a convolution adds ``(before, after)`` each spatial dimension.

    Args:
        padding: The convolution's padding rule.
        input_size: Spatial size of its input; may be symbolic.
        convolution: The convolution, or its geometry.
    """
    kernel_size, dilation = convolution.kernel_size, convolution.dilation
    declared = convolution.padding
    if padding.rule == "fixed":
        return list(padding.amounts)
    if padding.rule == "same":
        return [
            _tensorflow_same(*numbers)
            for numbers in zip(input_size, kernel_size, convolution.stride, dilation, strict=True)
        ]
    if declared == "valid":
        return [(0, 0)] * len(input_size)
    if isinstance(declared, str):  # "same": torch puts the odd pixel behind
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(amount), int(amount)) for amount in declared]


def output_padding_between(
    convolution: Convolution, input_size: Sequence[Any], output_size: Sequence[Any]
) -> tuple[Any, ...]:
    """The output padding by which a transposed convolution gets from one size to another.

    In pixels per spatial dimension; sizes may be symbolic.
    """
    padding = cast("tuple[int, ...]", convolution.padding)  # torch takes no word here
    return tuple(
        length_out - ((length - 1) * step - 2 * pad) - (spacing * (taps - 1) + 1)
        for length_out, length, step, pad, spacing, taps in zip(
            output_size,
            input_size,
            convolution.stride,
            padding,
            convolution.dilation,
            convolution.kernel_size,
            strict=True,
        )
    )


def pad_modes(padding: Padding, convolution: Convolution) -> tuple[str, ...]:
    """The padding mode of each spatial dimension, in torch.nn's words; see :func:`pad_amounts`."""
    ndim = len(convolution.kernel_size)
    if padding.rule == "declared":
        return (convolution.padding_mode,) * ndim
    return padding.modes or ("zeros",) * ndim


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


def pad_by_axis(image: Tensor, amounts: Sequence[tuple[Any, Any]], modes: Sequence[str]) -> Tensor:
    """Pad each spatial dimension in a mode of its own; the order of the dimensions is irrelevant.

    Args:
        image: Shape ``(N, C, *size)``.
        amounts: Pixels ``(before, after)`` each dimension.
        modes: Its padding mode, in torch.nn's words.
    """
    for mode in dict.fromkeys(modes):
        own = [pair if at == mode else (0, 0) for pair, at in zip(amounts, modes, strict=True)]
        if all(isinstance(n, int) and n == 0 for pair in own for n in pair):
            continue
        image = F.pad(image, flat_amounts(own), mode="constant" if mode == "zeros" else mode)
    return image


def flat_amounts(amounts: Sequence[tuple[Any, Any]]) -> list[Any]:
    """``(before, after)`` per dimension as ``F.pad`` wants it: last dimension first."""
    return list(itertools.chain.from_iterable(reversed(amounts)))
