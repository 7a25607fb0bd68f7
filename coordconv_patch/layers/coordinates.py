"""What a coordinate channel is.

A *convention* fixes the order of the coordinate channels, their range, where
+1 and -1 lie (centring) and how the radius is measured. Two models trained
under different conventions are different models, so the convention is a value
of its own, :class:`Coordinates`: frozen, comparable, and saved with the weights.

The default is the convention of Liu et al. 2018, "An intriguing failing of
convolutional neural networks and the CoordConv solution"
(https://arxiv.org/abs/1807.03247): channels (x, y), x along W and y along H,
-1 at the first pixel centre and +1 at the last.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from coordconv_patch.errors import CoordinatesError, excerpt
from coordconv_patch.layers.grid_cache import GridCache

__all__ = ["Coordinates", "Window"]

_AXIS_NAMES = ("x", "y", "z")
"""Axis names, counted from the last dimension: x along W, y along H, z along D."""
_LARGEST_PIXEL = 2**31 - 1
"""Windows lie in images of at most so many pixels along an axis."""
_LARGEST_VALUE = 1e18
"""Coordinates of at most this size have squares that are finite in float32."""
_MOST_OCTAVES = 32
"""At 32 octaves float64 still tells sin(2^k pi u) to six digits; NeRF uses 10."""


@dataclass(frozen=True)
class Window:
    """A rectangle of a larger image, in pixels of that image.

    A tile or crop that is given its window sees the coordinates of the whole
    image. All three fields are in the order of a tensor's spatial dimensions:
    ``(H, W)`` for images, ``(L,)`` for signals, ``(D, H, W)`` for volumes.

    Inside a network, a feature map of ``h'`` rows stands for the same part of
    the image, so its full-image counterpart has ``h' * image_size / size`` rows.

    Args:
        offset: First pixel of the window, ``(top, left)``, whole numbers, each ``>= 0``.
        size: Extent of the window, ``(height, width)``, each ``>= 1``.
        image_size: Extent of the whole image, ``(height, width)``, each below ``2**31``.

    Raises:
        CoordinatesError: If the numbers are not whole ones, or the window does not lie
            inside the image.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]
    image_size: tuple[int, ...]

    def __post_init__(self) -> None:
        _refuse_subclass(self, Window)
        for field in ("offset", "size", "image_size"):
            object.__setattr__(self, field, _pixels(field, getattr(self, field)))
        if not len(self.offset) == len(self.size) == len(self.image_size):
            raise CoordinatesError(
                f"{self}: offset, size and image_size must have one number per spatial "
                "dimension each, such as offset=(top, left), size=(h, w), image_size=(H, W)"
            )
        for offset, size, image in zip(self.offset, self.size, self.image_size, strict=True):
            if offset < 0 or size < 1 or offset + size > image:
                raise CoordinatesError(
                    f"{self} does not lie inside its image: need 0 <= offset, 1 <= size and "
                    "offset + size <= image_size in every dimension"
                )


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """A frozen description of the coordinate channels.

    With u the position of a pixel along its axis, from -1 to 1, index i of n::

        align_corners=True    u = (2i - (n - 1)) / (n - 1)   -1 and 1 at the outer pixel centres
        align_corners=False   u = (2i + 1 - n) / n           -1 and 1 at the outer pixel edges

    An axis of length 1 gives u = 0 under every convention; the published forms
    that divide by ``n - 1`` give NaN there. A coordinate is u mapped linearly to
    ``value_range``.

    Args:
        order: ``"xy"`` puts x (along W) first, then y (along H), then z (along D);
            ``"yx"`` the reverse.
        align_corners: Centring, in the sense of :func:`torch.nn.functional.grid_sample`.
        value_range: Values of the coordinate at u = -1 and at u = 1.
        radius: Add a channel r, the distance of (x, y) from ``radius_center``.
        radius_center: The coordinate value from which r is measured on every axis;
            ``None`` means the image centre, the middle of ``value_range``.
        fourier: Number of octaves k = 0, 1, ... for which sin(2^k pi u) and
            cos(2^k pi u) are added for every axis (Mildenhall et al. 2020, "NeRF",
            eq. 4); at most 32.
        window: Where in a larger image the input lies; ``None`` means that the
            input is the whole image.
        swap_sizes: Divide x by H - 1 and y by W - 1, as the authors' released code
            does. A known bug, kept so that its weights can be imported; it shows
            on inputs that are not square.

    Raises:
        CoordinatesError: If a value is out of range or of another type (1 is not
            ``True``), or if this is a subclass: files and programs name a convention by
            these fields alone.

    Example:
        >>> Coordinates().grid((1, 3)).tolist()
        [[[-1.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]]
        >>> Coordinates(radius=True).channel_names(2)
        ('x', 'y', 'r')
    """

    order: Literal["xy", "yx"] = "xy"
    align_corners: bool = True
    value_range: tuple[float, float] = (-1.0, 1.0)
    radius: bool = False
    radius_center: float | None = None
    fourier: int = 0
    window: Window | None = None
    swap_sizes: bool = False

    def __post_init__(self) -> None:
        _refuse_subclass(self, Coordinates)
        if type(self.order) is not str or self.order not in ("xy", "yx"):
            raise CoordinatesError(
                f"order={excerpt(self.order)}: write 'xy' (x first) or 'yx' (y first)"
            )
        for field in ("align_corners", "radius", "swap_sizes"):
            value = getattr(self, field)
            if type(value) is not bool:
                raise CoordinatesError(f"{field}={excerpt(value)}: write True or False")
        object.__setattr__(self, "value_range", _range(self.value_range))
        if not _is_whole(self.fourier) or not 0 <= self.fourier <= _MOST_OCTAVES:
            raise CoordinatesError(
                f"fourier={excerpt(self.fourier)}: write a number of octaves, 0 or more and at "
                f"most {_MOST_OCTAVES}"
            )
        object.__setattr__(self, "fourier", int(self.fourier))
        if self.window is not None and type(self.window) is not Window:
            raise CoordinatesError(f"window={excerpt(self.window)}: write a Window(...) or None")
        if self.radius_center is not None:
            object.__setattr__(self, "radius_center", _center(self.radius_center))
        self._check_combination()

    def _check_combination(self) -> None:
        if self.radius_center is not None and not self.radius:
            raise CoordinatesError("radius_center is given, but radius=False: write radius=True")
        if self.swap_sizes and (self.window is not None or not self.align_corners):
            raise CoordinatesError(
                "swap_sizes reproduces the released reference code, which knows neither windows "
                "nor align_corners=False: leave those out"
            )

    @classmethod
    def preset(cls, name: str, *, radius: bool = False) -> Coordinates:
        """The convention of a published implementation.

        Args:
            name: One of

                - ``"paper"``: the default of this package; what the paper describes.
                - ``"reference"``: uber-research/CoordConv as released: x first, but x
                  divided by H - 1 and y by W - 1 (a known bug, kept; see ``swap_sizes``).
                - ``"mkocabas"``: mkocabas/CoordConv-pytorch, and the many ports made from
                  it: y (row) first, and r measured from 0.5 instead of 0 (a known bug,
                  kept: the centre of r lies off the image centre).
                - ``"solo"``: SOLO, SOLOv2: x first, endpoints, no radius.
                - ``"paddledetection"``: PP-YOLO in PaddleDetection: as ``"solo"``.

                An axis of length 1 gives 0 in each, where the originals give NaN
                (SOLO: -1).
            radius: Add the radius channel as that implementation computes it.

        Raises:
            CoordinatesError: If there is no such preset, or it has no radius channel.
        """
        if type(radius) is not bool:
            raise CoordinatesError(f"radius={excerpt(radius)}: write True or False")
        if not isinstance(name, str):
            raise CoordinatesError(
                f"preset {excerpt(name)}: write one of {', '.join(sorted(_PRESETS))}"
            )
        if name not in _PRESETS:
            close = difflib.get_close_matches(name, _PRESETS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise CoordinatesError(
                f"no coordinate preset {excerpt(name)}: {hint}presets are "
                f"{', '.join(sorted(_PRESETS))}"
            )
        fields = dict(_PRESETS[name])
        if radius:
            if name in _PRESETS_WITHOUT_RADIUS:
                raise CoordinatesError(
                    f"preset {name!r} has no radius channel; write Coordinates(radius=True) for "
                    "the paper's"
                )
            fields["radius"] = True
            if name == "mkocabas":
                fields["radius_center"] = 0.5
        return cls(**fields)

    @classmethod
    def of(cls, value: Coordinates | str | None) -> Coordinates:
        """Accept what a ``coords=`` argument may be: a description, a preset's name or None."""
        if value is None:
            return cls()
        if isinstance(value, str):
            return cls.preset(value)
        if isinstance(value, Coordinates):
            _refuse_subclass(value, Coordinates)
            return value
        raise CoordinatesError(
            f"coords={excerpt(value)}: write a Coordinates(...), or the name of a preset "
            f"({', '.join(sorted(_PRESETS))})"
        )

    def channel_names(self, ndim: int) -> tuple[str, ...]:
        """Names of the K channels for ``ndim`` spatial dimensions, in their order."""
        axes = self._axes(ndim)
        names = list(axes)
        if self.radius:
            names.append("r")
        for octave in range(self.fourier):
            for axis in axes:
                names += [f"sin({2**octave}\u03c0{axis})", f"cos({2**octave}\u03c0{axis})"]
        return tuple(names)

    def num_channels(self, ndim: int) -> int:
        """K, the number of coordinate channels for ``ndim`` spatial dimensions (1 to 3)."""
        return ndim + int(self.radius) + 2 * ndim * self.fourier

    def grid(
        self,
        size: Sequence[int | torch.SymInt | Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The coordinate channels of an input.

        Computed in float64 and then cast, so that every dtype gets the nearest
        representable coordinate. While a graph is captured (``torch.compile``,
        ``torch.export``, ``torch.jit.trace``) sizes may be symbolic; the grid is
        then computed from them by traceable operations in at least float32, which
        for the default convention gives the same bits.

        Args:
            size: Spatial size of the input: ``(L,)``, ``(H, W)`` or ``(D, H, W)``.
            device: Where the grid is wanted. Default: torch's default device.
            dtype: Floating dtype of the grid. Default: torch's default dtype.

        Returns:
            Tensor of shape ``(K, *size)``, the caller's own.

        Raises:
            CoordinatesError: If ``size`` does not have 1 to 3 dimensions, or not as
                many as the window, if it is not of whole numbers, or ``dtype`` not
                of floats.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise CoordinatesError(f"dtype={dtype}: coordinates are fractions, write a float dtype")
        shared = self.shared_grid(size, device=device, dtype=dtype)
        if is_capturing() or is_transforming():
            return shared  # made for this call
        # Not a tensor of inference mode, which could not be used for training later.
        with torch.inference_mode(False):
            return shared.clone()

    def shared_grid(
        self,
        size: Sequence[int | torch.SymInt | Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As :meth:`grid`, without a copy: others get the same tensor, so only read it."""
        device = torch.get_default_device() if device is None else torch.device(device)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        size = tuple(size)
        self._check_ndim(len(size))
        if is_capturing() or not all(type(length) is int for length in size):
            if not is_capturing() and (plain := _plain_sizes(size)) is not None:
                return self.shared_grid(plain, device=device, dtype=dtype)
            compute_dtype = torch.promote_types(dtype, torch.float32)
            return self._compute(size, device, compute_dtype).to(dtype)
        if is_transforming():
            # A fake or wrapped tensor must not reach the cache.
            return self._compute(size, device, torch.float64).to(dtype)
        key = (self, size, device, dtype)
        kept = _cached_grid.lookup(key)
        if kept is not None:
            return kept
        return _cached_grid.keep(key, self._computed(cast("tuple[int, ...]", size), device, dtype))

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the default, JSON-ready; see :meth:`from_dict`.

        Raises:
            CoordinatesError: If this is a subclass, which these fields would not tell.
        """
        _refuse_subclass(self, Coordinates)
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                fields[field.name] = dataclasses.asdict(value) if field.name == "window" else value
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Coordinates:
        """Inverse of :meth:`to_dict`.

        Raises:
            CoordinatesError: If a field is unknown (a newer version wrote it) or invalid.
        """
        if not isinstance(fields, Mapping):
            raise CoordinatesError(f"coordinate fields {excerpt(fields)}: they must be a mapping")
        values: dict[Any, Any] = dict(fields)
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise CoordinatesError(
                f"unknown coordinate fields {excerpt(sorted(unknown, key=str))}: a newer version "
                "of coordconv_patch may have written them"
            )
        try:
            if values.get("window") is not None:
                values["window"] = _window(values["window"])
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CoordinatesError(
                f"coordinate fields {excerpt(values)} are invalid: {error}"
            ) from error

    def __str__(self) -> str:
        ndim = 2 if self.window is None else len(self.window.size)
        names = ", ".join(self.channel_names(ndim)[: ndim + self.radius])
        parts = [f"({names})"]
        parts += [f"{key}={value!r}" for key, value in self.to_dict().items() if key != "radius"]
        return " ".join(parts)

    def _axes(self, ndim: int) -> tuple[str, ...]:
        self._check_ndim(ndim)
        axes = _AXIS_NAMES[:ndim]
        return axes if self.order == "xy" else axes[::-1]

    def _check_ndim(self, ndim: int) -> None:
        if not 1 <= ndim <= len(_AXIS_NAMES):
            raise CoordinatesError(f"{ndim} spatial dimensions: coordinates know 1, 2 or 3")
        if self.window is not None and len(self.window.size) != ndim:
            raise CoordinatesError(
                f"{self.window} has {len(self.window.size)} dimensions, the input has {ndim} "
                "spatial dimensions"
            )

    def _compute(
        self,
        size: tuple[int | torch.SymInt | Tensor, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """The grid ``(K, *size)`` by plain torch operations in ``dtype``."""
        lines = self.lines(size, device, dtype)
        expanded = cast("tuple[int, ...]", size)
        channels = [_along(line, dim, len(size)).expand(expanded) for dim, line in lines]
        if self.radius:
            axes = channels[: len(size)]
            low, high = self.value_range
            center = (low + high) / 2 if self.radius_center is None else self.radius_center
            squares = [(values - center).square() for values in axes]
            channels.insert(len(size), functools.reduce(torch.add, squares).sqrt())
        return torch.stack(channels)

    def lines(
        self,
        size: tuple[int | torch.SymInt | Tensor, ...],
        device: torch.device,
        dtype: torch.dtype,
        indices: Sequence[Tensor] | None = None,
    ) -> list[tuple[int, Tensor]]:
        """Each channel but the radius, in order: the dimension it depends on, and its values there.

        By plain torch operations in ``dtype``.

        Args:
            size: Spatial size, in pixels.
            device: Device of the values.
            dtype: Their dtype.
            indices: For each dimension the pixels to tell of, any shape, beyond the image too;
                ``None``: all of the image.
        """
        ndim = len(size)
        low, high = self.value_range
        dims = {axis: ndim - 1 - _AXIS_NAMES.index(axis) for axis in self._axes(ndim)}
        if indices is None:
            lengths = cast("tuple[int, ...]", size)
            indices = [torch.arange(length, device=device, dtype=dtype) for length in lengths]
        positions = {
            dim: self._axis_positions(dim, size, indices[dim].to(device, dtype))
            for dim in dims.values()
        }
        if (low, high) == (-1.0, 1.0):
            lines = list(positions.items())
        else:
            half, middle = (high - low) / 2, (low + high) / 2
            lines = [(dim, middle + position * half) for dim, position in positions.items()]
        for octave in range(self.fourier):
            for dim, position in positions.items():
                angle = position * (2**octave * math.pi)
                lines += [(dim, angle.sin()), (dim, angle.cos())]
        return lines

    def _computed(self, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The grid as the cache keeps it."""
        if min(size) < 0:
            raise CoordinatesError(f"size={size}: an input has 0 pixels along an axis, or more")
        # Float64 does not exist on every device (MPS), so the grid is made on the CPU; and a
        # tensor made in inference mode could not be used for training later.
        with torch.inference_mode(False):
            return self._compute(size, torch.device("cpu"), torch.float64).to(device, dtype)

    def _axis_positions(
        self,
        dim: int,
        size: tuple[int | torch.SymInt | Tensor, ...],
        index: Tensor,
    ) -> Tensor:
        """The position u of pixels along one axis, in the shape of ``index``."""
        length: Any = size[dim]
        if self.window is None:
            full: Any = length
        else:
            full = length * self.window.image_size[dim] / self.window.size[dim]
            index = index + length * self.window.offset[dim] / self.window.size[dim]
        if not self.align_corners:
            return (2 * index + 1 - full) / full
        if self.swap_sizes and len(size) > 1:
            # The released code swaps the divisors of the two image axes.
            full = size[{len(size) - 1: -2, len(size) - 2: -1}.get(dim, dim)]
        last = full - 1
        return (2 * index - last) / _at_least_one(last)


_cached_grid = GridCache(max_bytes=64 * 2**20)
"""Grids by convention, size, device and dtype: eight of 2 x 1024 x 1024 in float32."""


def _along(line: Tensor, dim: int, ndim: int) -> Tensor:
    """A line as a tensor of ``ndim`` dimensions that all but one have length 1."""
    return line.reshape([-1 if at == dim else 1 for at in range(ndim)])


def _refuse_subclass(value: object, base: type) -> None:
    if type(value) is not base:
        raise CoordinatesError(
            f"{type(value).__name__} is a subclass of {base.__name__}, which is not supported: "
            f"files, programs and exports tell a convention by the fields of {base.__name__} "
            "alone, so it would come back as another one"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _plain_sizes(size: Sequence[object]) -> tuple[int, ...] | None:
    """Sizes of numpy's or other integers as Python's; ``None`` for symbolic ones."""
    if all(_is_whole(length) for length in size):
        return tuple(int(cast(int, length)) for length in size)
    for length in size:
        if not (isinstance(length, (torch.SymInt, Tensor)) or _is_whole(length)):
            raise CoordinatesError(f"size={excerpt(size)}: write whole numbers, such as (224, 224)")
    return None


def _pixels(field: str, values: object) -> tuple[int, ...]:
    """One of a window's fields; numpy's integers become Python's."""
    if (
        not isinstance(values, (tuple, list))
        or not 1 <= len(values) <= len(_AXIS_NAMES)
        or not all(_is_whole(value) and abs(value) <= _LARGEST_PIXEL for value in values)
    ):
        raise CoordinatesError(
            f"window: {field}={excerpt(values)}: write a tuple of one to three whole numbers "
            f"below 2**31, one per spatial dimension, such as {field}=(224, 224)"
        )
    return tuple(int(value) for value in values)


def _window(fields: object) -> Window:
    """A window from parsed JSON, which may hold anything."""
    names = ("offset", "size", "image_size")
    given: Mapping[Any, Any] = fields if isinstance(fields, Mapping) else {}
    missing = [name for name in names if name not in given]
    if missing or len(given) > len(names):
        what = f"missing {missing[0]}" if missing else f"it has more fields than {names}"
        raise CoordinatesError(f"window: {excerpt(fields)}: {what}")
    return Window(**given)


def _finite(value: object) -> float:
    """A real number as a float; NaN if it is none, or too large to be a coordinate."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if abs(number) <= _LARGEST_VALUE else math.nan


def _range(value: object) -> tuple[float, float]:
    numbers_given = value if isinstance(value, (tuple, list)) and len(value) == 2 else (None, None)
    low, high = map(_finite, numbers_given)
    if not low < high:
        raise CoordinatesError(
            f"value_range={excerpt(value)}: write two finite numbers, the smaller first, such as "
            f"(-1.0, 1.0); none beyond {_LARGEST_VALUE:g}"
        )
    return low, high


def _center(value: object) -> float:
    center = _finite(value)
    if math.isnan(center):
        raise CoordinatesError(
            f"radius_center={excerpt(value)}: write a finite number, the coordinate from which r "
            f"is measured, or None; none beyond {_LARGEST_VALUE:g}"
        )
    return center


_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "reference": {"swap_sizes": True},
    "mkocabas": {"order": "yx"},
    "solo": {},
    "paddledetection": {},
}
_PRESETS_WITHOUT_RADIUS = ("solo", "paddledetection")


def _at_least_one(last: Any) -> Any:
    """The divisor n - 1, or 1 on an axis of one pixel, for numbers and symbols alike."""
    if isinstance(last, Tensor):
        return last.clamp(min=1)
    if isinstance(last, (int, float)):
        return last if last > 0 else 1
    return torch.sym_max(last, 1)


def is_capturing() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is looking on, in this thread."""
    # The first flag is one for the whole process; whether this thread captures, the others tell.
    return (
        torch.compiler.is_compiling()
        and (torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0)
    ) or torch._C._is_tracing()


def is_transforming() -> bool:
    """Whether what is computed now must not be kept, nor be left out because it was kept.

    Under dispatch modes and torch.func transforms tensors may be fake or wrapped. A function
    mode of somebody else (NNCF's) may be drawing a graph, which every later call must match.
    """
    return (
        is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch._C._len_torch_function_stack() > 0 and _is_watched())
    )


def _is_watched() -> bool:
    """Whether a torch function mode is active that neither torch itself nor this package sets."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(
        type(mode).__module__.partition(".")[0] not in ("torch", "coordconv_patch")
        for mode in modes
    )
