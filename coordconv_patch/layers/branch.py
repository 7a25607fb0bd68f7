"""The coordinate branch: the second term of a CoordConv.

A convolution is linear in its input channels, so a CoordConv (a convolution of
the input x concatenated with coordinate channels c) is the sum of two::

    conv([x ; c], [W ; W_c]) = conv(x, W) + conv(c, W_c)

The second term does not depend on the image: it is a map of shape
(1, C_out, H', W') for each input size. At ``W_c = 0`` the sum is conv(x, W) to
the last bit, in every dtype; that is what lets a trained model be patched.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.traceback import annotate, preserve_node_meta

from coordconv_patch.errors import ArgumentError, excerpt
from coordconv_patch.files.fields import mapping, text, whole, wholes
from coordconv_patch.layers.compiled_map import map_by_lines, suits_lines
from coordconv_patch.layers.coordinates import Coordinates, is_capturing, is_transforming
from coordconv_patch.layers.geometry import (
    CONV_FUNCTIONS,
    DECLARED,
    ConvGeometry,
    Padding,
    pad_amounts,
    pad_by_axis,
    pad_modes,
)
from coordconv_patch.layers.map_cache import MapCache
from coordconv_patch.layers.unsupported import refuse_mkldnn, refuse_script

__all__ = [
    "BRANCH_NAME",
    "CONVENTION_KEY",
    "ChosenCalls",
    "CoordBranch",
    "CoordLayer",
    "coordinate_map",
    "grid_for",
    "pad_grid",
    "zero_if_missing",
]

BRANCH_NAME = "coord_branch"
"""Name of the submodule that a :class:`CoordBranch` is added under."""


_MOST_CALLS = 100_000
"""Calls of one convolution in a forward pass, at most."""

CONVENTION_KEY = "coordconv_patch"
"""Under this key of ``meta["custom"]`` the nodes of an exported grid tell their convention."""


def grid_for(coord_weight: Tensor, coords: Coordinates, input_size: Sequence[int]) -> Tensor:
    """Coordinate channels on a weight's device and in its dtype, shape ``(1, K, *input_size)``.

    In a program of torch.export their nodes carry the convention, and a saved program
    keeps that: :func:`coordconv_patch.from_exported` makes a layer of them again.
    """
    device, dtype = coord_weight.device, coord_weight.dtype
    # The flag is one for the whole process, and the annotations are too.
    if not (torch.compiler.is_exporting() and is_capturing()):
        return coords.shared_grid(input_size, device=device, dtype=dtype).unsqueeze(0)
    with _telling(coords):
        return coords.shared_grid(input_size, device=device, dtype=dtype).unsqueeze(0)


@contextmanager
def _telling(coords: Coordinates) -> Iterator[None]:
    """While entered, nodes that torch.export records carry the convention."""
    # Strict export lets dynamo see to it that annotations reach the graph; otherwise they
    # are taken over only where that is asked for.
    with preserve_node_meta(), annotate({CONVENTION_KEY: coords.to_dict()}):
        yield


def pad_grid(
    grid: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
    rule: Padding,
) -> tuple[Tensor, str | Sequence[int]]:
    """Pad coordinate channels as a convolution pads its input.

    Args:
        grid: Coordinate channels, shape ``(N or 1, K, *input_size)``.
        kernel_size: The convolution's own; so for the arguments after it.
        stride: See ``kernel_size``.
        padding: Numbers, ``"same"`` or ``"valid"``.
        dilation: See ``kernel_size``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rule: How the convolution really pads, where its attributes do not say it.

    Returns:
        The grid and the padding that is left for the convolution function to do.
    """
    if rule.rule == "declared" and padding_mode == "zeros":
        return grid, padding
    amounts = pad_amounts(
        rule,
        grid.shape[2:],
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        declared=padding,
    )
    modes = pad_modes(rule, padding_mode, len(kernel_size))
    return pad_by_axis(grid, amounts, modes), (0,) * len(kernel_size)


def coordinate_map(
    grid: Tensor,
    coord_weight: Tensor,
    *,
    transposed: bool,
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    padding_mode: str = "zeros",
    rule: Padding = DECLARED,
    output_padding: Sequence[int] = (),
) -> Tensor:
    """The branch: the coordinate channels convolved with the coordinate weight.

    Args:
        grid: Coordinate channels, shape ``(N or 1, K, *input_size)``.
        coord_weight: Shape ``(C_out, K, *kernel_size)``; ``(K, C_out, *kernel_size)``
            if transposed.
        transposed: Whether the convolution is a transposed one.
        stride: The convolution's own; so for the arguments after it.
        padding: See :func:`pad_grid`.
        dilation: See ``stride``.
        padding_mode: See :func:`pad_grid`.
        rule: See :func:`pad_grid`.
        output_padding: Of a transposed convolution, in pixels per dimension.

    Returns:
        Tensor of shape ``(N or 1, C_out, *output_size)``.
    """
    convolve = CONV_FUNCTIONS[len(stride), transposed]
    if transposed:
        return convolve(
            grid, coord_weight, None, stride, padding, tuple(output_padding), 1, dilation
        )
    grid, padding = pad_grid(
        grid,
        kernel_size=coord_weight.shape[2:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
        rule=rule,
    )
    return convolve(grid, coord_weight, None, stride, padding, dilation)


@dataclass(frozen=True)
class ChosenCalls:
    """Which calls of a convolution get coordinates, where not all of them do.

    Attributes:
        indices: The calls, counted from 0 in order of execution.
        total: How many calls there were when they were chosen.
        caller: Qualified name of the module during whose call they are counted, ``""``
            for the model itself; in a graph they are the convolution's nodes.
    """

    indices: tuple[int, ...]
    total: int
    caller: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready; see :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ChosenCalls:
        """Inverse of :meth:`to_dict`, from parsed JSON, which may hold anything.

        Raises:
            ArgumentError: If a field is missing, unknown or of another type, or the calls
                are not in order, each once and below ``total``.
        """
        values = mapping(fields, "calls", ("indices", "total", "caller"))
        total = whole(values["total"], "total", low=1, high=_MOST_CALLS)
        indices = wholes(values["indices"], "indices", range(1, total + 1), high=total - 1)
        if any(later <= earlier for earlier, later in itertools.pairwise(indices)):
            raise ArgumentError(
                f"indices must be in order, each call once, not {excerpt(list(indices))}"
            )
        return cls(indices, total, text(values["caller"], "caller"))

    def __str__(self) -> str:
        """Such as ``calls 0, 3 of 5``."""
        plural = "s" if len(self.indices) > 1 else ""
        return f"call{plural} {', '.join(map(str, self.indices))} of {self.total}"


class CoordLayer(nn.Module):
    """What holds a coordinate weight: a patched convolution, or the branch of a functional one.

    Attributes:
        coords: The convention of the coordinate channels.
        coord_weight: Parameter of shape ``(C_out, K, *kernel_size)``, for transposed
            convolutions ``(K, C_out, *kernel_size)``, whatever the groups.
        coord_padding: How the convolution pads its input.
    """

    coords: Coordinates
    coord_weight: nn.Parameter
    coord_padding: Padding
    _map_cache: MapCache
    _followed: Any = None
    """The ``_conv_forward`` put on the instance that ``coord_padding`` was found for, if any."""

    def map_for(self, input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """The coordinate map for a call of the convolution; a kept one where that is safe.

        Args:
            input: The convolution's input, batched or not.
            output: What the plain convolution made of it.
            weight: The coordinate weight, which a parametrization computes at every access.
        """
        if torch.is_grad_enabled() and weight.requires_grad:
            self._map_cache.clear()
        elif (
            type(weight) is nn.Parameter
            and (weight.is_cpu or self._map_cache.is_constant)
            and not (is_capturing() or is_transforming())
        ):
            if self.__dict__.get("_conv_forward") is not self._followed:
                self._follow_padding()
            return self._map_cache.get(weight, input, output, self.compute_map)
        return self.compute_map(input, output, weight)

    def compute_map(self, input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """The same, computed anew. Shape ``(1, C_out, *output_size)``, without 1 if unbatched."""
        raise NotImplementedError

    def _follow_padding(self) -> None:
        """Let the coordinates be padded as the plain forward pads now."""

    def keep_maps_constant_(self) -> None:
        """Keep coordinate maps from now on without looking whether the weight has changed."""
        self._map_cache = MapCache(is_constant=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._map_cache.clear()  # its maps are on the old device, in the old dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class CoordBranch(CoordLayer):
    """The branch alone: added to a functional convolution, or to chosen calls of a module.

    Args:
        geometry: Geometry of the convolution whose output it is added to.
        coords: The convention of the coordinate channels.
        padding: How the convolution pads its input, where its geometry does not say it.
        device: Where the coordinate weight lives.
        dtype: Its dtype.

    Attributes:
        chosen_calls: Which calls of the convolution it is added to; ``None``: every one.

    Shape:
        - input: the convolution's input, ``(N, C_in, *input_size)`` or unbatched.
        - output: ``(1, C_out, *output_size)``, unbatched if the input is.
        - coord_weight: as in :class:`CoordConvNd`.
    """

    def __init__(
        self,
        geometry: ConvGeometry,
        coords: Coordinates,
        *,
        padding: Padding = DECLARED,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._map_cache = MapCache()
        self.geometry = geometry
        self.coords = coords
        self.coord_padding = padding
        self.chosen_calls: ChosenCalls | None = None
        self.__dict__["__module__"] = "torch.nn.modules.conv"  # an fx leaf, see CoordConvNd
        shape = geometry.coord_weight_shape(coords.num_channels(geometry.ndim))
        self.coord_weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel size of the convolution, as a convolution module has it."""
        return self.geometry.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        weight = self.coord_weight
        # The convolution's output, whose dtype tells whether autocast is on, is not known here.
        if (
            weight.is_meta
            or input.layout is not torch.strided
            or torch.is_autocast_enabled(weight.device.type)
        ):
            return self.compute_map(input, input, weight)
        return self.map_for(input, input, weight)

    def compute_map(self, input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """As :meth:`CoordLayer.compute_map`; the output is not looked at."""
        geometry = self.geometry
        input_size = input.shape[-geometry.ndim :]
        if suits_lines(input, weight, self.coords, geometry, self.coord_padding):
            branch = map_by_lines(input_size, weight, self.coords, geometry, self.coord_padding)
        else:
            branch = self.compute_branch(input_size, geometry.output_padding, weight)
        branch = branch.squeeze(0) if input.dim() == geometry.ndim + 1 else branch
        if input.layout is not torch.strided:  # MKLDNN tensors add only to their like
            return branch.expand(len(input), *branch.shape[1:]).contiguous().to_mkldnn()
        return branch

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("coords", "geometry", "coord_padding"):
            self._map_cache.clear()

    def compute_branch(
        self,
        input_size: Sequence[int],
        output_padding: Sequence[int],
        weight: Tensor | None = None,
        grid: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`CoordConvNd.compute_branch`; ``grid`` may hold the channels already."""
        geometry = self.geometry
        weight = self.coord_weight if weight is None else weight
        return coordinate_map(
            grid_for(weight, self.coords, input_size) if grid is None else grid,
            weight,
            transposed=geometry.transposed,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            padding_mode=geometry.padding_mode,
            rule=self.coord_padding,
            output_padding=output_padding,
        )

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        refuse_mkldnn(self)
        return super().named_children()

    def __prepare_scriptable__(self) -> nn.Module:
        """As :meth:`CoordConvNd.__prepare_scriptable__`."""
        return refuse_script(self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._map_cache.clear()
        zero_if_missing(self, state_dict, prefix, missing_keys)

    def extra_repr(self) -> str:
        return f"{self.geometry}, coords={self.coords}"


def zero_if_missing(
    layer: CoordLayer,
    state_dict: Mapping[str, Any],
    prefix: str,
    missing_keys: list[str],
) -> None:
    """Take a plain checkpoint for what it is: one whose coordinate weights are all zero.

    With ``strict=False`` torch's rule stands: what is missing is reported, and kept.
    """
    key = prefix + "coord_weight"
    load = _load_in_progress()
    if key not in missing_keys or not load.get("strict", True):
        return
    missing_keys.remove(key)
    weight = layer.coord_weight
    if weight.is_meta:  # load_state_dict(assign=True) onto a model without memory
        # torch hands each module its own part of the state_dict, which may be empty.
        tensors = [*state_dict.values(), *load.get("state_dict", {}).values()]
        device = next((t.device for t in tensors if isinstance(t, Tensor)), weight.device)
        zeros = torch.zeros_like(weight, device=device)
        layer.coord_weight = nn.Parameter(zeros, weight.requires_grad)
    else:
        nn.init.zeros_(weight)


def _load_in_progress() -> Mapping[str, Any]:
    """The arguments that the caller gave to ``load_state_dict``; empty if it does not run.

    torch tells every layer ``strict=True`` and applies the caller's choice at the end, so
    it is looked up where it is: in that function's frame.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return frame.f_locals
        frame = frame.f_back
    return {}
