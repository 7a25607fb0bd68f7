"""The coordinate branch, and the layers that carry it.

A convolution is linear in its input channels, so a CoordConv (a convolution of
the input x concatenated with coordinate channels c) is the sum of two::

    conv([x ; c], [W ; W_c]) = conv(x, W) + conv(c, W_c)

The second term, the *branch*, does not depend on the image: it is a map of shape
(1, C_out, H', W') for each input size. At ``W_c = 0`` the sum is conv(x, W) to
the last bit, in every dtype; that is what lets a trained model be patched.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from coordconv_patch.coords import Coordinates, is_capturing, is_transforming
from coordconv_patch.errors import PatchError
from coordconv_patch.geometry import (
    CONV_FUNCTIONS,
    DECLARED,
    TORCH_CONVS,
    ConvGeometry,
    Padding,
    flat_amounts,
    pad_amounts,
    padding_of,
)

__all__ = [
    "CoordBranch",
    "CoordConv1d",
    "CoordConv2d",
    "CoordConv3d",
    "CoordConvNd",
    "CoordConvTranspose1d",
    "CoordConvTranspose2d",
    "CoordConvTranspose3d",
]


BRANCH_NAME = "coord_branch"
"""Name of the submodule that a :class:`CoordBranch` is added under."""


class MapCache:
    """Coordinate maps of one layer, kept between inference calls.

    Every use compares the weight's values with those that the maps were made
    from. A version counter would be cheaper, but it misses writes through
    ``.data``, NumPy and DLPack views, and a stale map is a wrong answer. The
    comparison costs microseconds on the CPU; on other devices it would force a
    synchronisation, so maps are kept on the CPU only.

    The cache is not part of the layer's state: copies and pickles start empty.
    """

    max_maps = 8
    """Maps kept per layer: a detector's shared head sees five or six input sizes."""

    __slots__ = ("_last_key", "_last_map", "_maps", "_weight")

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._maps: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._last_key: tuple[Any, ...] = ()
        self._last_map: Tensor | None = None

    def get(self, layer: CoordConvNd, weight: Tensor, input: Tensor, output: Tensor) -> Tensor:
        """The layer's map to add to ``output``, made from the values that ``weight`` has now.

        The output's dtype tells whether autocast is on; its shape, the output padding.
        """
        kept = self._weight
        if kept is None or kept.dtype is not weight.dtype or not torch.equal(kept, weight):
            self.clear()
            self._weight = weight.detach().clone()
        # Few memory accesses matter here: a convolution before has emptied the processor's
        # caches, and each miss costs as much as a hundred instructions.
        key = (input.shape, output.shape, output.dtype)
        if key != self._last_key or self._last_map is None:
            self._last_map = self._find(layer, input, output)
            self._last_key = key
        return self._last_map

    def _find(self, layer: CoordConvNd, input: Tensor, output: Tensor) -> Tensor:
        ndim = len(layer.kernel_size)
        sizes = (tuple(input.shape[-ndim:]), tuple(output.shape[-ndim:]))
        key = (*sizes, output.dim(), output.dtype)
        found = self._maps.get(key)
        if found is None:
            # Not an inference tensor, whatever mode this call runs in: a later one may train.
            # And not from autocast's own copy of the weight, which may be older than the weight.
            with torch.inference_mode(False), torch.no_grad(), _autocast_cache_off():
                found = self._maps[key] = layer.branch_for(input, output)
            if len(self._maps) > self.max_maps:
                self._maps.popitem(last=False)
        return found

    def clear(self) -> None:
        """Forget every map, and the memory that they take."""
        self._weight = self._last_map = None
        self._maps.clear()

    def __len__(self) -> int:
        return len(self._maps)

    def __reduce__(self) -> tuple[type[MapCache], tuple[()]]:
        return MapCache, ()


@contextmanager
def _autocast_cache_off() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


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
    declared = rule.rule == "declared"
    if declared and padding_mode == "zeros":
        return grid, padding
    amounts = pad_amounts(
        rule,
        grid.shape[2:],
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        declared=padding,
    )
    mode = padding_mode if declared else "constant"
    return F.pad(grid, flat_amounts(amounts), mode=mode), (0,) * len(kernel_size)


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


_MAP_ATTRIBUTES = frozenset(
    {"coords", "coord_padding", "stride", "padding", "dilation", "padding_mode", "output_padding"}
)
"""Attributes of a layer that its coordinate map is made from, besides its weight."""


class CoordConvNd(_ConvNd):
    """What every coordinate convolution has in common; mixed in before a convolution class.

    A layer takes the arguments of the plain class, and ``coords=``: any stride,
    padding, padding mode, dilation and groups, and unbatched inputs too. The
    coordinate weight starts at zero, so a fresh layer computes what the plain
    class computes under the same seed.

    Args:
        *args: As the plain class.
        coords: A :class:`Coordinates` or the name of a preset; ``None``: the paper's.
        **kwargs: As the plain class.

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
    _plain_class: type[_ConvNd]
    """The class that the layer has without coordinates."""
    __signature__: inspect.Signature
    _output_is_fresh: bool = True
    """Whether the plain forward returns a tensor that nobody else holds."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Shown by help() and editors, and read by torch.nn.utils.skip_init.
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls._plain_class)
        coords = inspect.Parameter("coords", inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = list(signature.parameters.values())
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            cls.__signature__ = signature.replace(parameters=[*parameters, coords])

    def __init__(self, *args: Any, coords: Coordinates | str | None = None, **kwargs: Any) -> None:
        convention = Coordinates.of(coords)
        super().__init__(*args, **kwargs)
        self._attach(convention, DECLARED, _new_coord_weight(self, convention))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution plus the coordinate branch.

        Args:
            input: Shape ``(N, C_in, *input_size)``, or ``(C_in, *input_size)``.
            *args: Passed on to the plain class (``output_size`` of a transposed one).
            **kwargs: Likewise.

        Returns:
            Tensor of the shape and dtype that the plain convolution returns.
        """
        output = super().forward(input, *args, **kwargs)
        weight = self.coord_weight
        own_parameter = type(weight) is nn.Parameter
        if weight.requires_grad and torch.is_grad_enabled():
            self._map_cache.clear()
            branch = self.branch_for(input, output)
        elif own_parameter and weight.is_cpu and not (is_capturing() or is_transforming()):
            branch = self._map_cache.get(self, weight, input, output)
        else:
            branch = self.branch_for(input, output)
        # In place where nobody can hold the output yet: it saves a copy of the activations.
        # Functional calls bring a tensor instead of the parameter, a vmapped one perhaps.
        if own_parameter and self._output_is_fresh:
            return output.add_(branch)
        return output + branch

    def branch_for(self, input: Tensor, output: Tensor) -> Tensor:
        """The coordinate map to add to the plain convolution's output, in its dtype.

        Args:
            input: The convolution's input, batched or not.
            output: What the plain convolution made of it.

        Returns:
            Shape ``(1, C_out, *output_size)``, unbatched ``(C_out, *output_size)``.
        """
        ndim = len(self.kernel_size)
        input_size = input.shape[-ndim:]
        output_padding = self.output_padding_of(input_size, output.shape[-ndim:])
        branch = self.compute_branch(input_size, output_padding).to(output.dtype)
        return branch if output.dim() == ndim + 2 else branch.squeeze(0)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _MAP_ATTRIBUTES and "_map_cache" in self.__dict__:
            self._map_cache.clear()

    def compute_branch(
        self,
        input_size: Sequence[int],
        output_padding: Sequence[int],
        grid: Tensor | None = None,
    ) -> Tensor:
        """The coordinate map for one input size.

        Args:
            input_size: Spatial size of the input, such as ``(H, W)``.
            output_padding: Of a transposed convolution, in pixels per dimension.
            grid: The coordinate channels of that size, shape ``(N or 1, K, *input_size)``;
                ``None``: made from the convention.

        Returns:
            Shape ``(N or 1, C_out, *output_size)``.
        """
        weight = self.coord_weight
        if grid is None:
            grid = self.coords.grid(input_size, device=weight.device, dtype=weight.dtype)
            grid = grid.unsqueeze(0)
        return coordinate_map(
            grid,
            weight,
            transposed=self.transposed,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
            rule=self.coord_padding,
            output_padding=output_padding,
        )

    def output_padding_of(
        self, input_size: Sequence[int], output: Sequence[int]
    ) -> tuple[int, ...]:
        """The output padding by which a transposed convolution reached an asked ``output_size``."""
        if not self.transposed:
            return ()
        padding = cast("tuple[int, ...]", self.padding)
        return tuple(
            output[len(output) - len(input_size) + dim]
            - ((input_size[dim] - 1) * self.stride[dim] - 2 * padding[dim])
            - (self.dilation[dim] * (self.kernel_size[dim] - 1) + 1)
            for dim in range(len(input_size))
        )

    def reset_parameters(self) -> None:
        """Reset the plain convolution as torch does, and the coordinate weight to zero.

        A fresh layer thus computes what torch.nn's layer computes under the same seed.
        """
        super().reset_parameters()
        if "coord_weight" in self._parameters:
            nn.init.zeros_(self.coord_weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coords={self.coords}"  # type: ignore[no-untyped-call]

    def concatenated_weight(self) -> Tensor:
        """The weight of the published, concatenating form of this layer, detached.

        Returns:
            Shape ``(C_out, C_in + K, *kernel_size)``, for transposed convolutions
            ``(C_in + K, C_out, *kernel_size)``: the input's channels first, then the
            coordinates in the convention's order.

        Raises:
            PatchError: If the convolution is grouped: there is no such form then.
        """
        self._require_one_group()
        with torch.no_grad():
            return torch.cat((self.weight, self.coord_weight), dim=0 if self.transposed else 1)

    @torch.no_grad()
    def load_concatenated_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take over the weight of a concatenating CoordConv; see :meth:`concatenated_weight`.

        Args:
            weight: Shape ``(C_out, C_in + K, *kernel_size)``, transposed as above.
            bias: Shape ``(C_out,)``, if this layer has a bias.

        Raises:
            PatchError: If a shape does not fit, or the convolution is grouped.
        """
        self._require_one_group()
        expected = self.concatenated_weight().shape
        if weight.shape != expected:
            raise PatchError(
                f"the concatenated weight has shape {tuple(weight.shape)}, this layer needs "
                f"{tuple(expected)}"
            )
        if (bias is None) != (self.bias is None) or (
            bias is not None and self.bias is not None and bias.shape != self.bias.shape
        ):
            raise PatchError("the bias does not fit: pass one exactly if the layer has one")
        dim = 0 if self.transposed else 1
        plain = weight.narrow(dim, 0, self.in_channels)
        coord = weight.narrow(dim, self.in_channels, weight.shape[dim] - self.in_channels)
        self.weight.copy_(plain)
        self.coord_weight.copy_(coord)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def _require_one_group(self) -> None:
        if self.groups != 1:
            raise PatchError(
                f"a convolution with groups={self.groups} has no concatenated form: its groups "
                "do not see the same channels"
            )

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
        _zero_if_missing(self, state_dict, prefix, missing_keys)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made_here = type(self) is coord_class(self._plain_class)
        if made_here and self._plain_class not in TORCH_CONVS:
            # The class was made at run time, so it is rebuilt from the class it stands on.
            return _new_layer, (self._plain_class,), self.__dict__
        return super().__reduce_ex__(protocol)

    def _attach(self, coords: Coordinates, padding: Padding, coord_weight: nn.Parameter) -> None:
        """Give a module that already is a convolution what makes it a coordinate convolution."""
        self.coords = coords
        self.coord_padding = padding
        self._map_cache = MapCache()
        # torch.fx looks at the *instance's* __module__ to decide what to trace through:
        # convolutions are leaves there, and must stay leaves for everyone's tracer.
        self.__dict__["__module__"] = "torch.nn.modules.conv"
        self.coord_weight = coord_weight

    def _detach(self) -> None:
        """Inverse of :meth:`_attach`."""
        del self._parameters["coord_weight"]
        for name in ("coords", "coord_padding", "_map_cache", "__module__"):
            del self.__dict__[name]


class CoordConv1d(CoordConvNd, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with coordinates; coord_weight has shape (C_out, K, k)."""

    _plain_class = nn.Conv1d


class CoordConv2d(CoordConvNd, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with coordinates; coord_weight has shape (C_out, K, kH, kW)."""

    _plain_class = nn.Conv2d


class CoordConv3d(CoordConvNd, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with coordinates; coord_weight has shape (C_out, K, kD, kH, kW)."""

    _plain_class = nn.Conv3d


class CoordConvTranspose1d(CoordConvNd, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` with coordinates; coord_weight is (K, C_out, k)."""

    _plain_class = nn.ConvTranspose1d


class CoordConvTranspose2d(CoordConvNd, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with coordinates; coord_weight is (K, C_out, kH, kW)."""

    _plain_class = nn.ConvTranspose2d


class CoordConvTranspose3d(CoordConvNd, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` with coordinates; its weight is (K, C_out, kD, kH, kW)."""

    _plain_class = nn.ConvTranspose3d


_COORD_CLASSES: dict[type[_ConvNd], type[CoordConvNd]] = {
    nn.Conv1d: CoordConv1d,
    nn.Conv2d: CoordConv2d,
    nn.Conv3d: CoordConv3d,
    nn.ConvTranspose1d: CoordConvTranspose1d,
    nn.ConvTranspose2d: CoordConvTranspose2d,
    nn.ConvTranspose3d: CoordConvTranspose3d,
}


def coord_class(plain: type[_ConvNd]) -> type[CoordConvNd]:
    """The coordinate class that stands on a convolution class; the same one every time."""
    if plain not in _COORD_CLASSES:
        _COORD_CLASSES[plain] = _make_coord_class(plain)
    return _COORD_CLASSES[plain]


def _make_coord_class(plain: type[_ConvNd]) -> type[CoordConvNd]:
    return type(
        f"Coord{plain.__name__}",
        (CoordConvNd, plain),
        {
            "_plain_class": plain,
            "_output_is_fresh": False,
            "__doc__": f"{plain.__name__} with a coordinate branch.",
        },
    )


def _new_layer(plain: type[_ConvNd]) -> CoordConvNd:
    """An empty layer of the coordinate class on ``plain``, for unpickling."""
    made = coord_class(plain)
    return made.__new__(made)


class CoordBranch(nn.Module):
    """The branch alone: added to a functional convolution in a graph.

    Args:
        geometry: Geometry of the convolution whose output it is added to.
        coords: The convention of the coordinate channels.
        device: Where the coordinate weight lives.
        dtype: Its dtype.

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
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.coords = coords
        self.__dict__["__module__"] = "torch.nn.modules.conv"  # an fx leaf, see CoordConvNd
        shape = geometry.coord_weight_shape(coords.num_channels(geometry.ndim))
        self.coord_weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        geometry = self.geometry
        branch = self.compute_branch(input.shape[-geometry.ndim :], geometry.output_padding)
        return branch.squeeze(0) if input.dim() == geometry.ndim + 1 else branch

    def compute_branch(
        self,
        input_size: Sequence[int],
        output_padding: Sequence[int],
        grid: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`CoordConvNd.compute_branch`."""
        geometry, weight = self.geometry, self.coord_weight
        if grid is None:
            grid = self.coords.grid(input_size, device=weight.device, dtype=weight.dtype)
            grid = grid.unsqueeze(0)
        return coordinate_map(
            grid,
            weight,
            transposed=geometry.transposed,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            padding_mode=geometry.padding_mode,
            output_padding=output_padding,
        )

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
        _zero_if_missing(self, state_dict, prefix, missing_keys)

    def extra_repr(self) -> str:
        return f"{self.geometry}, coords={self.coords}"


def _zero_if_missing(
    layer: CoordConvNd | CoordBranch,
    state_dict: Mapping[str, Any],
    prefix: str,
    missing_keys: list[str],
) -> None:
    """Take a plain checkpoint for what it is: one whose coordinate weights are all zero.

    With ``strict=False`` torch's rule stands: what is missing is reported, and kept.
    """
    key = prefix + "coord_weight"
    if key not in missing_keys or not _loading_strictly():
        return
    missing_keys.remove(key)
    weight = layer.coord_weight
    if weight.is_meta:  # load_state_dict(assign=True) onto a model without memory
        device = next((value.device for value in state_dict.values()), weight.device)
        zeros = torch.zeros_like(weight, device=device)
        layer.coord_weight = nn.Parameter(zeros, weight.requires_grad)
    else:
        nn.init.zeros_(weight)


def _loading_strictly() -> bool:
    """The ``strict`` that the caller gave to ``load_state_dict``.

    torch tells every layer ``strict=True`` and applies the caller's choice at the end, so
    it is looked up where it is: in that function's frame.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals.get("strict", True))
        frame = frame.f_back
    return True


def check_convertible(module: _ConvNd) -> Padding:
    """Whether :func:`convert_` would succeed; returns how the module pads.

    Raises:
        PatchError: With the reason why it would not.
    """
    if isinstance(module, CoordConvNd):
        raise PatchError(f"it already is a CoordConv with coordinates {module.coords}")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise PatchError("it is lazy: run the model once, so that its shape is known")
    if not isinstance(module, TORCH_CONVS):
        raise PatchError(f"{type(module).__name__} is no torch.nn convolution of 1 to 3 dimensions")
    if "forward" in vars(module):
        raise PatchError(
            "its forward is replaced on the instance (accelerate hooks, perhaps), which would "
            "bypass the coordinates: patch the model before"
        )
    if not module.weight.dtype.is_floating_point:
        raise PatchError(f"its weight has dtype {module.weight.dtype}; coordinates need floats")
    return padding_of(module)


def convert_(module: _ConvNd, coords: Coordinates, padding: Padding) -> None:
    """Turn a convolution module into its coordinate class, in place.

    The object keeps its identity, and with it its hooks, parameters, flags and
    aliases; only its class changes. Call :func:`check_convertible` before.
    """
    coord_weight = _new_coord_weight(module, coords)  # first: it may not fit into memory
    before = type(module)
    if parametrize.is_parametrized(module):
        # torch takes a parametrized module back to its first base class when the last
        # parametrization is removed, so the coordinate class goes beneath.
        plain = cast("type[_ConvNd]", before.__bases__[0])
        module.__class__ = _on_other_base(before, coord_class(plain))
    else:
        module.__class__ = coord_class(before)
    try:
        cast(CoordConvNd, module)._attach(coords, padding, coord_weight)
    except BaseException:
        module.__class__ = before
        raise


def _on_other_base(parametrized: type, base: type) -> type:
    """The class that torch made for a parametrized module, on another base class."""
    namespace = {
        k: v for k, v in vars(parametrized).items() if k not in ("__dict__", "__weakref__")
    }
    return type(parametrized.__name__, (base,), namespace)


def _new_coord_weight(module: _ConvNd, coords: Coordinates) -> nn.Parameter:
    geometry = ConvGeometry.of(module)
    shape = geometry.coord_weight_shape(coords.num_channels(geometry.ndim))
    weight = module.weight
    return nn.Parameter(torch.zeros(shape, device=weight.device, dtype=weight.dtype))


def revert_(module: CoordConvNd) -> None:
    """Turn a coordinate convolution back into the class it was made from, in place."""
    module._detach()
    before, plain = type(module), module._plain_class
    if parametrize.is_parametrized(module):
        plain = _on_other_base(before, plain)
    module.__class__ = plain  # type: ignore[assignment]  # it is a CoordConvNd no longer


def coord_layers(model: nn.Module) -> dict[str, CoordConvNd | CoordBranch]:
    """Every layer of a model that holds a coordinate weight, by site name, each once.

    In order of registration.
    """
    found: dict[str, CoordConvNd | CoordBranch] = {}
    for name, module in model.named_modules():
        if isinstance(module, CoordConvNd):
            found[name] = module
        elif isinstance(module, CoordBranch):
            # "conv1.coord_branch" belongs to site conv1, "w_coord_branch" to site w.
            found[name.removesuffix(BRANCH_NAME)[:-1]] = module
    return found
