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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from coordconv_patch.channels.block import ChannelBlock
from coordconv_patch.channels.convention_fields import (
    octaves_of,
    radius_center_of,
    refuse_subclass,
    seed_of,
    value_range_of,
)
from coordconv_patch.channels.positions import AXIS_NAMES, AxisPixels
from coordconv_patch.channels.registry import blocks_from_fields, blocks_of
from coordconv_patch.channels.scrambled_positions import scrambled_positions
from coordconv_patch.errors import CoordinatesError, excerpt
from coordconv_patch.layers.capture import is_capturing, is_transforming
from coordconv_patch.layers.dtype_limits import check_fits
from coordconv_patch.layers.field_combinations import SHORT_FIELDS, check_combination
from coordconv_patch.layers.grid_cache import GridCache
from coordconv_patch.layers.grid_size import check_grid_arguments, plain_sizes
from coordconv_patch.layers.pixel_positions import pixel_positions
from coordconv_patch.layers.presets import PRESET_NAMES, preset_fields
from coordconv_patch.layers.usual_blocks import usual_blocks
from coordconv_patch.layers.window import Window, window_from_fields
from coordconv_patch.running.torch_versions import at_least_float32, default_device

__all__ = ["Coordinates"]


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
        channels: The channels as a list of blocks, such as ``(Axes("y"), Fourier("x"))``, in
            place of all other fields but ``window``: see :class:`coordconv_patch.Axes`,
            :class:`coordconv_patch.Radius`, :class:`coordconv_patch.Fourier` and, for blocks of
            your own, :func:`coordconv_patch.register_channel_block`. Empty: the channels that the
            other fields say.
        scrambled: The seed of a permutation of all places, see :func:`coordconv_patch.scrambled`;
            ``None``: every place keeps its own coordinates.

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
    channels: tuple[ChannelBlock, ...] = ()
    scrambled: int | None = None
    _usual_blocks: ClassVar[tuple[tuple[ChannelBlock, ...], ...]] = ()

    def __post_init__(self) -> None:
        refuse_subclass(self, Coordinates)
        if type(self.order) is not str or self.order not in ("xy", "yx"):
            raise CoordinatesError(
                f"order={excerpt(self.order)}: write 'xy' (x first) or 'yx' (y first)"
            )
        for field in ("align_corners", "radius", "swap_sizes"):
            value = getattr(self, field)
            if type(value) is not bool:
                raise CoordinatesError(f"{field}={excerpt(value)}: write True or False")
        object.__setattr__(self, "value_range", value_range_of(self.value_range))
        object.__setattr__(self, "fourier", octaves_of("fourier", self.fourier, least=0))
        if self.window is not None and type(self.window) is not Window:
            raise CoordinatesError(f"window={excerpt(self.window)}: write a Window(...) or None")
        if self.radius_center is not None:
            object.__setattr__(self, "radius_center", radius_center_of(self.radius_center))
        object.__setattr__(self, "channels", blocks_of(self.channels))
        object.__setattr__(self, "scrambled", seed_of(self.scrambled))
        check_combination(self.__dict__, _DEFAULTS)
        self._kept_usual_blocks()

    def _kept_usual_blocks(self) -> tuple[tuple[ChannelBlock, ...], ...]:
        """What the fields are short for, by dimensions; kept, as captured code wants it too."""
        fields = {name: getattr(self, name) for name in SHORT_FIELDS}
        usual = tuple(usual_blocks(ndim, **fields) for ndim in (1, 2, 3))
        object.__setattr__(self, "_usual_blocks", usual)
        return usual

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept_usual_blocks()

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
        return cls(**preset_fields(name, radius=radius))

    @classmethod
    def of(cls, value: Coordinates | str | None) -> Coordinates:
        """Accept what a ``coords=`` argument may be: a description, a preset's name or None."""
        if value is None:
            return cls()
        if isinstance(value, str):
            return cls.preset(value)
        if isinstance(value, Coordinates):
            refuse_subclass(value, Coordinates)
            return value
        raise CoordinatesError(
            f"coords={excerpt(value)}: write a Coordinates(...), or the name of a preset "
            f"({PRESET_NAMES})"
        )

    def blocks(self, ndim: int) -> tuple[ChannelBlock, ...]:
        """What the channels are made of, for ``ndim`` spatial dimensions (1 to 3).

        ``channels``, or the blocks that the other fields are short for.
        """
        if not 1 <= ndim <= len(AXIS_NAMES):
            raise CoordinatesError(f"{ndim} spatial dimensions: coordinates know 1, 2 or 3")
        return self.channels or (self._usual_blocks or self._kept_usual_blocks())[ndim - 1]

    def channel_names(self, ndim: int) -> tuple[str, ...]:
        """Names of the K channels for ``ndim`` spatial dimensions, in their order."""
        self._check_ndim(ndim)
        return tuple(name for block in self.blocks(ndim) for name in block.names(ndim))

    def num_channels(self, ndim: int) -> int:
        """K, the number of coordinate channels for ``ndim`` spatial dimensions (1 to 3)."""
        return sum(len(block.names(ndim)) for block in self.blocks(ndim))

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
                many as the window, if it is not of whole numbers, ``dtype`` not of
                floats, or ``device`` not one.
        """
        check_grid_arguments(size, device, dtype)
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
        device = default_device() if device is None else torch.device(device)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        size = tuple(size)
        self._check_ndim(len(size))
        if is_capturing() or not all(type(length) is int for length in size):
            if not is_capturing() and (plain := plain_sizes(size)) is not None:
                return self.shared_grid(plain, device=device, dtype=dtype)
            return self._compute(size, device, at_least_float32(dtype)).to(dtype)
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
        refuse_subclass(self, Coordinates)
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "window":
                value = dataclasses.asdict(value)
            elif field.name == "channels":
                value = [block.to_dict() for block in value]
            fields[field.name] = value
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
                values["window"] = window_from_fields(values["window"])
            if "channels" in values:
                values["channels"] = blocks_from_fields(values["channels"])
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CoordinatesError(
                f"coordinate fields {excerpt(values)} are invalid: {error}"
            ) from error

    def __str__(self) -> str:
        if self.channels:
            beside = {"window": self.window, "scrambled": self.scrambled}
            given = "".join(f" {k}={v}" for k, v in beside.items() if v is not None)
            return f"({', '.join(map(str, self.channels))}){given}"
        ndim = 2 if self.window is None else len(self.window.size)
        names = ", ".join(self.channel_names(ndim)[: ndim + self.radius])
        parts = [f"({names})"]
        parts += [f"{key}={value!r}" for key, value in self.to_dict().items() if key != "radius"]
        return " ".join(parts)

    def _check_ndim(self, ndim: int) -> None:
        self.blocks(ndim)
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
        channels = self.values(pixel_positions(size, self.window, device, dtype))
        expanded = cast("tuple[int, ...]", size)
        return torch.stack([values.expand(expanded) for values in channels])

    def values(self, positions: Sequence[AxisPixels]) -> list[Tensor]:
        """Each channel's values at any pixels, elementwise, see :class:`AxisPixels`.

        The window does not matter: the pixels say themselves where they lie.
        """
        blocks = self.blocks(len(positions))
        if self.scrambled is not None:
            positions = scrambled_positions(positions, self.scrambled)
        return [values for block in blocks for values in block.values(positions)]

    def lines(
        self,
        size: tuple[int | torch.SymInt | Tensor, ...],
        device: torch.device,
        dtype: torch.dtype,
        indices: Sequence[Tensor],
    ) -> list[tuple[int, Tensor]]:
        """Each channel, in order: the dimension it depends on, and its values there.

        By plain torch operations in ``dtype``, of a convention that :meth:`is_separable`.

        Args:
            size: Spatial size, in pixels.
            device: Device of the values.
            dtype: Their dtype.
            indices: For each dimension the pixels to tell of, any shape, beyond the image too.
        """
        positions = pixel_positions(size, self.window, device, dtype, indices)
        dims = [dim for block in self.blocks(len(size)) for dim in block.dims(len(size))]
        lines = zip(dims, self.values(positions), strict=True)
        return [(dim, line) for dim, line in lines if dim is not None]

    def is_separable(self, ndim: int) -> bool:
        """Whether each channel depends on one of ``ndim`` spatial dimensions alone."""
        dims = [dim for block in self.blocks(ndim) for dim in block.dims(ndim)]
        return self.scrambled is None and None not in dims

    def _computed(self, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The grid as the cache keeps it."""
        if min(size) < 0:
            raise CoordinatesError(f"size={size}: an input has 0 pixels along an axis, or more")
        check_fits(self, size, dtype, "a grid")
        # Float64 does not exist on every device (MPS), so the grid is made on the CPU; and a
        # tensor made in inference mode could not be used for training later.
        with torch.inference_mode(False):
            grid = self._compute(size, torch.device("cpu"), torch.float64).to(device, dtype)
        names = self.channel_names(len(size))
        if len(grid) != len(names):
            raise CoordinatesError(
                f"{self} gives {len(grid)} channels, but names {len(names)}: {', '.join(names)}"
            )
        return grid


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Coordinates)}

_cached_grid = GridCache(max_bytes=64 * 2**20)
"""Grids by convention, size, device and dtype: eight of 2 x 1024 x 1024 in float32."""
