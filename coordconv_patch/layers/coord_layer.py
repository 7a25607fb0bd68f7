"""The base of all layers with coordinates: CoordConv layers, and the branch by itself.

A convolution is linear in its input channels, so a CoordConv (a convolution of
the input x concatenated with coordinate channels c) is the sum of two::

    conv([x ; c], [W ; W_c]) = conv(x, W) + conv(c, W_c)

The second term is the *branch*. It does not depend on the image: it is a map of shape
(1, C_out, H', W') for each input size. At ``W_c = 0`` the sum is conv(x, W) to
the last bit, in every dtype; that is what lets a trained model be patched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.capture import is_capturing, is_transforming
from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.layers.compiled_map import compiled_map, made_from, suits_lines
from coordconv_patch.layers.coordinate_map import coordinate_map, grid_for
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.dtype_limits import check_fits, convolved_dtype, is_checked, limited
from coordconv_patch.layers.geometry import ConvGeometry, Convolution, Padding
from coordconv_patch.layers.load_in_progress import load_in_progress
from coordconv_patch.layers.map_cache import MapCache
from coordconv_patch.layers.placed_grid import GridTarget, check_one_place_a_sample, placed_grid
from coordconv_patch.layers.places import Placed, Places
from coordconv_patch.layers.saved_convention import convention_refusal, tell_convention
from coordconv_patch.layers.unsupported import refuse_mkldnn, refuse_script
from coordconv_patch.running.inputs import check_is_module

__all__ = ["CoordLayer", "coord_layers", "new_coord_weight"]

_MAP_ATTRIBUTES = frozenset(
    {"coords", "coord_padding", "coord_geometry"}
    | {"stride", "padding", "dilation", "padding_mode", "output_padding"}
)
"""Attributes of a layer that its coordinate map is made from, besides its weight."""


class CoordLayer(nn.Module):
    """What holds a coordinate weight: a patched convolution, or the branch of a functional one.

    Attributes:
        coords: The convention of the coordinate channels.
        coord_weight: Parameter of shape ``(C_out, K, *kernel_size)``, for transposed
            convolutions ``(K, C_out, *kernel_size)``, whatever the groups.
        coord_padding: How the convolution pads its input.
        coord_geometry: The convolution's geometry.
        chosen_calls: Which calls of the convolution get coordinates; ``None``: every one.
    """

    coords: Coordinates
    coord_weight: nn.Parameter
    coord_padding: Padding
    coord_geometry: ConvGeometry
    chosen_calls: ChosenCalls | None = None
    _map_cache: MapCache
    _made_from: str = ""
    """What compiled code makes a map from besides the weight; empty: it convolves."""
    _places: Places | None = None
    """Which parts of their pictures samples are, once that was told; shared by a model's layers."""
    _followed: Any = None
    """The ``_conv_forward`` put on the instance that ``coord_padding`` was found for, if any."""

    @property
    def _site_name(self) -> str:
        """What messages call the layer."""
        return str(getattr(self, "site_name", "") or f"a convolution {self.coord_geometry}")

    @property
    def _convolution(self) -> Convolution:
        """The convolution that the map is made for."""
        return self.coord_geometry

    def _attach(self, coords: Coordinates, padding: Padding, coord_weight: nn.Parameter) -> None:
        """Give a module what makes it a coordinate layer."""
        self.coords = coords
        self.coord_padding = padding
        self._map_cache = MapCache()
        # torch.fx looks at the *instance's* __module__ to decide what to trace through:
        # convolutions are leaves there, and must stay leaves for everyone's tracer.
        self.__dict__["__module__"] = "torch.nn.modules.conv"
        self.coord_weight = coord_weight
        self._note_what_maps_are_made_from()

    def _note_what_maps_are_made_from(self) -> None:
        try:
            made = made_from(self.coords, self.coord_geometry, self.coord_padding)
        except (TypeError, ValueError):  # on the way to other attributes: those do not fit
            made = ""
        self.__dict__["_made_from"] = made

    def map_for(self, input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """The coordinate map for a call of the convolution; a kept one where that is safe.

        Args:
            input: The convolution's input, batched or not.
            output: What the plain convolution made of it.
            weight: The coordinate weight, which a parametrization computes at every access.
        """
        if torch.is_grad_enabled() and weight.requires_grad:
            # Code that torch.compile makes keeps no map, and in a checkpoint it may change nothing.
            if not torch.compiler.is_compiling():
                self._map_cache.clear()
        elif (
            type(weight) is nn.Parameter
            and (weight.is_cpu or self._map_cache.is_constant)
            and not (is_capturing() or is_transforming())
            and (self._places is None or self._places.now() is None)
        ):
            if not self._is_followed():
                self._follow_padding()
            return self._map_cache.get(weight, input, output, self.compute_map)
        return self.compute_map(input, output, weight)

    def compute_map(self, input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """The same, computed anew.

        Shape ``(1, C_out, *output_size)``, of samples with places ``(N, C_out, *output_size)``;
        without the first dimension if the input is not batched.
        """
        ndim = weight.dim() - 2
        input_size = input.shape[-ndim:]
        placed = None if self._places is None else self._places.now()
        if placed is not None:
            check_one_place_a_sample(placed, input, ndim, self._site_name)
            output_padding = self.output_padding_of(input_size, output.shape[-ndim:])
            branch = self.compute_branch(input_size, output_padding, weight, placed)
        elif self._made_from and suits_lines(input, weight):
            branch = compiled_map(weight, input_size, self._made_from)
        else:
            output_padding = self.output_padding_of(input_size, output.shape[-ndim:])
            branch = self.compute_branch(input_size, output_padding, weight)
        return branch if output.dim() == ndim + 2 else branch.squeeze(0)

    def check_channels(self, output: Tensor, weight: Tensor) -> None:
        """Refuse an output of other channels than the coordinate weight is for.

        Raises:
            PatchError: If the convolution's weight lost channels, and the layer was not asked.
        """
        if not torch.compiler.is_compiling() and torch._C._is_tracing():
            return  # by torch.jit.trace: sizes are tensors then, and comparing them is warned of
        channels = weight.shape[1 if self._convolution.transposed else 0]
        outputs = output.shape[1 - weight.dim()]  # a weight has as many dimensions as a batch
        if outputs != channels:
            raise PatchError(
                f"{self._site_name} gives {outputs} channels, and its coordinate weight is for "
                f"{channels}: its weight was changed where the coordinates cannot follow. They "
                "follow a new Parameter, conv.weight = nn.Parameter(...), in a layer whose every "
                "call has coordinates; otherwise save_coords(...) and unpatch(model, "
                "discard=True), change the plain model, patch it anew and fine-tune"
            )

    def compute_branch(
        self,
        input_size: Sequence[int],
        output_padding: Sequence[int],
        weight: Tensor | None = None,
        placed: Placed | None = None,
    ) -> Tensor:
        """The coordinate map for one input size.

        Args:
            input_size: Spatial size of the input, such as ``(H, W)``.
            output_padding: Of a transposed convolution, in pixels per dimension.
            weight: The coordinate weight; ``None``: the layer's.
            placed: The places of samples; ``None``: they are whole pictures.

        Returns:
            Shape ``(1, C_out, *output_size)``, with places ``(N, C_out, *output_size)``.

        Raises:
            CoordinatesError: If a coordinate is too large for the dtype that it is convolved in.
        """
        weight = self.coord_weight if weight is None else weight
        convolved = convolved_dtype(weight)
        # For messages alone: to format it takes longer than the checks, and old dynamos cannot.
        site = self._site_name if is_checked(convolved) else ""
        if placed is None:
            check_fits(self.coords, input_size, convolved, site)
            grid = limited(grid_for(weight, self.coords, input_size), convolved)
        else:
            target = GridTarget(weight.device, weight.dtype, convolved, site)
            grid = placed_grid(self.coords, placed, input_size, target)
        return coordinate_map(grid, weight, self._convolution, self.coord_padding, output_padding)

    def output_padding_of(
        self, input_size: Sequence[int], output_size: Sequence[int]
    ) -> tuple[int, ...]:
        """The output padding by which a transposed convolution gets from one size to another.

        In pixels per spatial dimension; empty if the convolution is not transposed.
        """
        raise NotImplementedError

    def _is_followed(self) -> bool:
        """Whether the coordinates are padded as the plain forward pads now."""
        return True

    def _follow_padding(self) -> None:
        """Let the coordinates be padded as the plain forward pads now."""

    def keep_maps_constant_(self) -> None:
        """Keep coordinate maps from now on without looking whether the weight has changed."""
        self._map_cache = MapCache(is_constant=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._map_cache.clear()  # its maps are on the old device, in the old dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _MAP_ATTRIBUTES and "_map_cache" in self.__dict__:
            self._map_cache.clear()
            if torch.compiler.is_compiling():
                self.__dict__["_made_from"] = ""
            else:
                self._note_what_maps_are_made_from()

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        refuse_mkldnn(self)
        return super().named_children()

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script calls first.

        Raises:
            PatchError: Always, with what to do instead.
        """
        return refuse_script(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tell_convention(destination, prefix, self.coords)

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
        refusal = convention_refusal(state_dict, prefix, local_metadata, self.coords)
        if refusal:
            error_msgs.append(refusal)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._map_cache.clear()
        self._zero_if_missing(state_dict, prefix, missing_keys)

    def _zero_if_missing(
        self, state_dict: Mapping[str, Any], prefix: str, missing_keys: list[str]
    ) -> None:
        """Load a plain checkpoint as one whose coordinate weights are all zero.

        With ``strict=False`` torch's rule stands: what is missing is reported, and kept.
        """
        key = prefix + "coord_weight"
        load = load_in_progress()
        if key not in missing_keys or not load.get("strict", True):
            return
        missing_keys.remove(key)
        weight = self.coord_weight
        if weight.is_meta:  # load_state_dict(assign=True) onto a model without memory
            # torch hands each module its own part of the state_dict, which may be empty.
            tensors = [*state_dict.values(), *load.get("state_dict", {}).values()]
            device = next((t.device for t in tensors if isinstance(t, Tensor)), weight.device)
            zeros = torch.zeros_like(weight, device=device)
            self.coord_weight = nn.Parameter(zeros, weight.requires_grad)
        else:
            nn.init.zeros_(weight)

    @classmethod
    def _site_of(cls, name: str) -> str:
        """The name of the site that a layer of this class and of a qualified name belongs to."""
        return name


def new_coord_weight(
    geometry: ConvGeometry,
    coords: Coordinates,
    *,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    """A coordinate weight of zeros for a convolution, see :class:`CoordLayer` for its shape."""
    shape = geometry.coord_weight_shape(coords.num_channels(geometry.ndim))
    return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))


def coord_layers(model: nn.Module) -> dict[str, CoordLayer]:
    """Every layer of a model that holds a coordinate weight, by site name, each once.

    In order of registration.

    Raises:
        PatchError: If this is not a module.
    """
    check_is_module(model)
    return {
        module._site_of(name): module
        for name, module in model.named_modules()
        if isinstance(module, CoordLayer)
    }
