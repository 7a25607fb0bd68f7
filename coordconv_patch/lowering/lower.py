"""Lower the coordinate branch to the form that it takes in an exported graph.

With x the input, c the coordinates of its size, W and W_c the weights::

    channels    conv([x ; c], [W ; W_c])         c constant; the published CoordConv
    map         conv(x, W) + m                   m = conv(c, W_c) constant
    branch      conv(x, W) + conv(c * 1_N, W_c)  c constant, expanded to the batch
    separable   conv(x, W) + conv(s * 1_N, V)    s constant, see :mod:`.separable`, :mod:`.strips`
    computed    conv(x, W) + conv(c(x), W_c)     c from x's size at run time
    none        conv(x, W)                       where c is zero, on inputs of 1 x 1 pixels

All are the same sum; they differ in what a runtime can fuse. The pass works on a copy that
is made for export: it replaces each layer's forward on the instance, so that parameter
names, and with them initializer names, stay.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coordconv_patch.errors import ExportError
from coordconv_patch.layers.branch import CoordBranch
from coordconv_patch.layers.coord_layer import CoordLayer, coord_layers
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.coordinate_map import coordinate_map, grid_for, pad_grid
from coordconv_patch.layers.geometry import (
    CONV_FUNCTIONS,
    DECLARED,
    Call,
    ConvGeometry,
    pad_amounts,
    pad_by_axis,
)
from coordconv_patch.lowering.separable import SeparableBasis, factors, separable_basis
from coordconv_patch.lowering.strips import Strip, banded_strip, flat_strip
from coordconv_patch.sites.recording import record_calls

__all__ = [
    "LOWERINGS",
    "CoordConstant",
    "CoordKernel",
    "Lowered",
    "Lowering",
    "LoweringSite",
    "lower_",
    "lowering_sites",
]

Lowering = Literal["channels", "map", "branch", "separable", "computed"]
LOWERINGS: tuple[str, ...] = get_args(Lowering)


@dataclass(frozen=True)
class CoordKernel:
    """The kernel that adds up the images of a strip, and what it can be made of instead.

    Attributes:
        tensor: Shape (C_out, 1, bands, ..., S).
        weight: The coordinate weight, shape (C_out, T); one tensor for all calls of a site.
        coefficients: How much of each tap is in each place, shape (T, bands * S); one tensor
            for all sites of a geometry and size. ``weight @ coefficients`` is the kernel.
        num_images: R, the places that have an image.
    """

    tensor: Tensor
    weight: Tensor
    coefficients: Tensor
    num_images: int


@dataclass(frozen=True)
class CoordConstant:
    """A tensor that the graph will hold, and what it can be made of instead.

    Attributes:
        tensor: Coordinate channels (1, K, *size), or a map (1, C_out, *output_size).
        factors: By band of rows, tensors whose broadcast product has the band's numbers in
            their order; ``None`` where there are none.
        strip: Where the tensor is a strip, how it is laid out.
        map_of: Where the tensor is a map, the strip that it can be made of instead, and the
            kernel with which that is convolved.
    """

    tensor: Tensor
    factors: tuple[tuple[Tensor, ...], ...] | None = None
    strip: Strip | None = None
    map_of: tuple[CoordConstant, CoordKernel] | None = None


@dataclass(frozen=True)
class Lowered:
    """What a lowering did.

    Attributes:
        lowerings: The form that each site that is called got, by site name; ``"none"``
            where coordinates are zero.
        constants: The coordinate constants that the graph will hold, each once.
        kernels: The kernels that add up strips among them.
    """

    lowerings: dict[str, str]
    constants: tuple[CoordConstant, ...]
    kernels: tuple[CoordKernel, ...]


class LoweringSite:
    """A coordinate layer and the calls that its lowering is chosen for.

    Attributes:
        name: The site's qualified name.
        layer: The layer.
        calls: Its calls on the example inputs, each size once.
    """

    def __init__(
        self, name: str, layer: CoordLayer, calls: Sequence[Call], shared: dict[Any, Any]
    ) -> None:
        self.name = name
        self.layer = layer
        self.calls = tuple(calls)
        self._shared = shared

    @property
    def geometry(self) -> ConvGeometry:
        """The convolution's geometry."""
        return self.layer.geometry

    @property
    def num_taps(self) -> int:
        """Multiplications an output value takes in the branch: channels times kernel pixels."""
        weight = self.layer.coord_weight
        return weight.numel() // self.geometry.out_channels

    @property
    def num_images(self) -> int | None:
        """The same in the separable form, for the largest call; ``None`` if there is none."""
        strips = [self.strip(call) for call in self.calls]
        widths = [strip.width for strip in strips if strip is not None]
        return max(widths) if widths and len(widths) == len(strips) else None

    @property
    def is_zero(self) -> bool:
        """Whether the coordinates of every call are zero."""
        return not any(self._grid(call).any() for call in self.calls)

    @property
    def map_bytes(self) -> int:
        """Bytes of the stored maps of all calls."""
        weight = self.layer.coord_weight
        pixels = sum(torch.Size(call.output_size).numel() for call in self.calls)
        return self.geometry.out_channels * pixels * weight.element_size()

    def basis(self, call: Call) -> SeparableBasis | None:
        """The images that the branch's maps are made of in one call."""
        return cast(
            "SeparableBasis | None",
            self._once("basis", call, torch.float64, lambda: self._make_basis(call)),
        )

    def strip(self, call: Call) -> Strip | None:
        """How these images are laid out for the separable form of one call."""

        def make() -> Strip | None:
            basis = self.basis(call)
            return None if basis is None else banded_strip(basis)

        return cast("Strip | None", self._once("layout", call, torch.float64, make))

    @torch.no_grad()
    def constant(self, lowering: str, call: Call) -> CoordConstant:
        """What the graph stores for one call; grids and bases are shared by value.

        Raises:
            ExportError: If the site has no such form.
        """
        dtype = self.layer.coord_weight.dtype
        if lowering == "map":
            basis = self.basis(call)
            tensor = self.layer.compute_branch(call.input_size, self._output_padding(call))
            if basis is None:
                return CoordConstant(tensor)
            # Convolved when a file is loaded, so what counts is the size of the kernel.
            flat = flat_strip(basis)
            stored = self._stored_strip("flat strip", flat, call)
            return CoordConstant(tensor, map_of=(stored, self.kernel(call, flat)))
        if lowering == "separable":
            banded = self.strip(call)
            if banded is None:
                raise ExportError(
                    f"{self.name} has no 'separable' form, because its coordinates "
                    f"({self.layer.coords}) do not each depend on one axis alone: choose 'branch'"
                )
            return self._stored_strip("strip", banded, call)
        return cast(
            CoordConstant, self._once("grid", call, dtype, lambda: self._make_channels(call))
        )

    @torch.no_grad()
    def kernel(self, call: Call, strip: Strip) -> CoordKernel:
        """V, as the kernel that adds up the images of a strip in one call."""
        basis = self.basis(call)
        assert basis is not None
        weight = self._weight_by_output
        coefficients = self._once(
            f"coefficients of {len(strip.bands)} bands",
            *(call, weight.dtype),
            lambda: strip.kernel(basis.coefficients).flatten(1).to(weight.dtype),
        )
        tensor = strip.kernel(basis.weight(weight)).to(weight.dtype)
        return CoordKernel(tensor, weight, coefficients, basis.rank)

    @functools.cached_property
    def _weight_by_output(self) -> Tensor:
        """The coordinate weight, shape (C_out, T)."""
        weight = self.layer.coord_weight.detach()
        return (weight.transpose(0, 1) if self.geometry.transposed else weight).flatten(1)

    def _stored_strip(self, kind: str, strip: Strip, call: Call) -> CoordConstant:
        dtype = self.layer.coord_weight.dtype

        def make() -> CoordConstant:
            return CoordConstant(strip.tensor(dtype), strip.factors(dtype), strip)

        return cast(CoordConstant, self._once(kind, call, dtype, make))

    def _make_channels(self, call: Call) -> CoordConstant:
        grid = _padded(self.layer, self._grid(call))
        found = factors(grid)
        return CoordConstant(grid, None if found is None else (found,))

    @torch.no_grad()
    def _make_basis(self, call: Call) -> SeparableBasis | None:
        weight = self.layer.coord_weight
        channels = self.layer.coords.num_channels(self.geometry.ndim)
        taps = torch.eye(self.num_taps, dtype=torch.float64, device=weight.device)
        taps = taps.reshape(self.num_taps, channels, *self.geometry.kernel_size)
        if self.geometry.transposed:
            taps = taps.transpose(0, 1)
        responses = self.layer.compute_branch(call.input_size, self._output_padding(call), taps)
        per_channel = self.num_taps // channels
        return separable_basis(responses[0], [t // per_channel for t in range(self.num_taps)])

    def _grid(self, call: Call) -> Tensor:
        return grid_for(self.layer.coord_weight.detach(), self.layer.coords, call.input_size)

    def _output_padding(self, call: Call) -> Sequence[int]:
        return self.layer.output_padding_of(call.input_size, call.output_size)

    def _once(self, kind: str, call: Call, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
        """What is made from coordinates and geometry alone, made once for all sites."""
        geometry = dataclasses.replace(self.geometry, in_channels=0, out_channels=0, groups=1)
        device = self.layer.coord_weight.device
        key: tuple[Any, ...] = (
            *(kind, self.layer.coords, self.layer.coord_padding, geometry, call, dtype, device),
        )
        if kind == "grid":  # of many geometries: told apart by how they pad
            padded = tuple(_padded(self.layer, self._grid(call)).shape)
            rule = None if isinstance(self.layer, CoordBranch) else self.layer.coord_padding
            key = (
                kind,
                self.layer.coords,
                rule,
                geometry.padding_mode,
                call.input_size,
                padded,
                dtype,
                device,
            )
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def lower_(
    model: nn.Module, example_inputs: Any, choose: Callable[[LoweringSite], Lowering]
) -> Lowered:
    """Replace the branch of every coordinate layer by its lowered form, in place.

    The model can run afterwards at the sizes of the example only, except where the
    lowering is ``"computed"``; meant for a copy that is about to be exported.

    Args:
        model: A patched model, in the mode in which it will be exported.
        example_inputs: As for :func:`coordconv_patch.plan`; they fix the sizes.
        choose: Gives each site's lowering.

    Layers that are not called on the example inputs stay as they are.

    Raises:
        ExportError: If a layer cannot take the form that was chosen for it.
        PatchError: If the model fails on the example inputs.
    """
    lowerings: dict[str, str] = {}
    constants: dict[int, CoordConstant] = {}
    kernels: list[CoordKernel] = []
    for site in lowering_sites(model, example_inputs):
        lowering = choose(site)
        lowerings[site.name] = lowering
        if lowering == "computed":
            continue
        if site.is_zero:
            lowerings[site.name] = "none"
            _replace_forward(site, "none", {})
            continue
        made = {call: site.constant(lowering, call) for call in site.calls}
        stored = {}
        for index, (call, constant) in enumerate(made.items()):
            constants[id(constant.tensor)] = constant
            site.layer.register_buffer(f"coord_constant_{index}", constant.tensor, persistent=False)
            add_up = None
            if constant.strip is not None:
                kernel = site.kernel(call, constant.strip)
                kernels.append(kernel)
                name = f"coord_weight_{index}"
                site.layer.register_buffer(name, kernel.tensor, persistent=False)
                add_up = functools.partial(constant.strip.add_up, kernel.tensor)
            stored[call] = _Stored(constant.tensor, add_up)
        _replace_forward(site, lowering, stored)
    return Lowered(lowerings, tuple(constants.values()), tuple(kernels))


def lowering_sites(model: nn.Module, example_inputs: Any) -> list[LoweringSite]:
    """The coordinate layers that a model calls on its example inputs."""
    layers = coord_layers(model)
    calls = record_calls(model, example_inputs, layers, ())
    shared: dict[Any, Any] = {}
    return [
        LoweringSite(name, layer, tuple(dict.fromkeys(calls[name])), shared)
        for name, layer in layers.items()
        if name in calls
    ]


@dataclass(frozen=True)
class _Stored:
    """What a lowered layer holds for one call: a constant; if it is a strip, what adds it up."""

    constant: Tensor
    add_up: Callable[[Tensor], Tensor] | None


def _padded(layer: CoordLayer, grid: Tensor) -> Tensor:
    if isinstance(layer, CoordBranch) or layer.geometry.transposed:
        return grid
    padded, _ = pad_grid(grid, layer.geometry, layer.coord_padding)
    return padded


def _replace_forward(site: LoweringSite, lowering: str, stored: Mapping[Call, _Stored]) -> None:
    name, layer = site.name, cast("CoordConvNd | CoordBranch", site.layer)

    def stored_for(source: Tensor, output: Sequence[int] | None = None) -> _Stored:
        ndim = layer.coord_weight.dim() - 2
        wanted = [int(length) for length in source.shape[-ndim:]]
        for call, found in stored.items():
            if list(call.input_size) == wanted and (
                output is None
                or list(call.output_size) == [int(length) for length in output[-ndim:]]
            ):
                return found
        raise ExportError(
            f"{name} is called at size {tuple(wanted)}, but was at "
            f"{[call.input_size for call in stored]} on the example inputs"
        )

    if isinstance(layer, CoordBranch):
        if lowering == "channels":
            raise ExportError(
                f"{name} is a functional convolution, which has no 'channels' lowering here: "
                "choose 'branch' or 'map'"
            )
        forward: Callable[..., Tensor] = (
            _zero_branch_forward
            if lowering == "none"
            else functools.partial(_branch_forward, layer, lowering, stored_for)
        )
    elif lowering == "none":
        forward = functools.partial(layer._plain_class.forward, layer)
    elif lowering == "channels":
        forward = functools.partial(_channels_forward, layer, stored_for)
    else:
        forward = functools.partial(_sum_forward, layer, lowering, stored_for)
    vars(layer)["forward"] = forward  # not by assignment: a layer takes a look at those


def _zero_branch_forward(input: Tensor) -> Tensor:
    """What is added to a functional convolution's output where coordinates are zero."""
    return input.new_zeros(())


def _branch_forward(
    layer: CoordBranch, lowering: str, stored_for: Callable[..., _Stored], input: Tensor
) -> Tensor:
    stored = stored_for(input)
    geometry = layer.geometry
    batched = input.dim() == geometry.ndim + 2
    if lowering == "map":
        branch = stored.constant
    else:
        grid = _expanded(stored.constant, input) if batched else stored.constant
        branch = (
            coordinate_map(
                grid, layer.coord_weight, geometry, layer.coord_padding, geometry.output_padding
            )
            if stored.add_up is None
            else stored.add_up(grid)
        )
    return branch if batched else branch.squeeze(0)


def _sum_forward(
    layer: CoordConvNd,
    lowering: str,
    stored_for: Callable[..., _Stored],
    input: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    output = layer._plain_class.forward(layer, input, *args, **kwargs)
    stored = stored_for(input, output.shape)
    batched = output.dim() == stored.constant.dim()
    if lowering == "map":
        branch = stored.constant
    else:
        grid = _expanded(stored.constant, input) if batched else stored.constant
        branch = (
            _convolve_padded(layer, grid, input, output)
            if stored.add_up is None
            else stored.add_up(grid)
        )
    return output + (branch if batched else branch.squeeze(0))


def _expanded(constant: Tensor, input: Tensor) -> Tensor:
    return constant.expand(input.shape[0], *constant.shape[1:])


def _convolve_padded(layer: CoordConvNd, grid: Tensor, input: Tensor, output: Tensor) -> Tensor:
    """The branch on coordinate channels that are padded already where the layer pads by itself."""
    ndim = len(layer.kernel_size)
    geometry = layer.geometry
    if layer.coord_padding.rule != "declared" or geometry.padding_mode != "zeros":
        geometry = dataclasses.replace(geometry, padding=(0,) * ndim, padding_mode="zeros")
    output_padding = layer.output_padding_of(input.shape[-ndim:], output.shape[-ndim:])
    return coordinate_map(grid, layer.coord_weight, geometry, DECLARED, output_padding)


def _channels_forward(
    layer: CoordConvNd,
    stored_for: Callable[..., _Stored],
    input: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    with _ConcatenateCoordinates(layer, stored_for(input).constant):
        return cast(Tensor, layer._plain_class.forward(layer, input, *args, **kwargs))


class _ConcatenateCoordinates(TorchFunctionMode):
    """While entered, the layer's convolution call gets the coordinates as further input channels.

    The class's own forward decides padding and weight (standardised, say), so it
    runs as it is; only the call that it makes in the end is widened.
    """

    def __init__(self, layer: CoordConvNd, grid: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.grid = grid
        self.function = CONV_FUNCTIONS[len(layer.kernel_size), layer.transposed]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not self.function:
            return func(*args, **(kwargs or {}))
        names = ("input", "weight", "bias", "stride", "padding")
        call = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        rest = args[len(names) :]
        input, weight = call.pop("input"), call.pop("weight")
        groups, ndim = self.layer.groups, len(self.layer.kernel_size)
        batched = input.dim() == ndim + 2
        input = input if batched else input.unsqueeze(0)
        if "padding" in call and input.shape[2:] != self.grid.shape[2:]:
            # The forward leaves some of its padding to the convolution; the grid has it all.
            input, call["padding"] = self._padded(input, call["padding"]), 0
        grid = self.grid.expand(input.shape[0], *self.grid.shape[1:])
        coord_weight: Tensor = self.layer.coord_weight
        if groups > 1:
            input = _with_coordinates_in_each_group(input, grid, groups)
            if self.layer.transposed:
                coord_weight = _spread_over_groups(coord_weight, groups)
                weight = weight.reshape(groups, -1, *weight.shape[1:])
                weight = torch.cat((weight, coord_weight), dim=1).flatten(0, 1)
        else:
            input = torch.cat((input, grid), dim=1)
            if self.layer.transposed:
                weight = torch.cat((weight, coord_weight), dim=0)
        if not self.layer.transposed:
            weight = torch.cat((weight, coord_weight), dim=1)
        positional = [call.pop(name) for name in names[2:]] if rest else []
        output = func(input, weight, *positional, *rest, **call)
        return output if batched else output.squeeze(0)

    def _padded(self, input: Tensor, padding: str | int | Sequence[int]) -> Tensor:
        ndim = input.dim() - 2
        own: Any = (padding,) * ndim if isinstance(padding, int) else padding
        geometry = dataclasses.replace(self.layer.geometry, padding=own)
        amounts = pad_amounts(DECLARED, input.shape[2:], geometry)
        return pad_by_axis(input, amounts, ("zeros",) * ndim)


def _with_coordinates_in_each_group(input: Tensor, grid: Tensor, groups: int) -> Tensor:
    """(N, C, ...) to (N, groups * (C / groups + K), ...): each group sees the coordinates last."""
    grouped = input.reshape(input.shape[0], groups, -1, *input.shape[2:])
    repeated = grid.unsqueeze(1).expand(-1, groups, *grid.shape[1:])
    return torch.cat((grouped, repeated), dim=2).flatten(1, 2)


def _spread_over_groups(coord_weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's (K, C_out, ...) to (groups, K, C_out / groups, ...)."""
    channels = coord_weight.shape[0]
    return coord_weight.reshape(channels, groups, -1, *coord_weight.shape[2:]).transpose(0, 1)
