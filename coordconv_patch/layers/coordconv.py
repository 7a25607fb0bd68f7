"""The layers that carry a coordinate branch: CoordConv, drop-in for torch.nn's convolutions."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.branch import (
    BRANCH_NAME,
    CoordBranch,
    CoordLayer,
    coordinate_map,
    grid_for,
    zero_if_missing,
)
from coordconv_patch.layers.compiled_map import map_by_lines, suits_lines
from coordconv_patch.layers.coordinates import Coordinates, is_capturing, is_transforming
from coordconv_patch.layers.geometry import (
    DECLARED,
    ConvGeometry,
    Padding,
)
from coordconv_patch.layers.map_cache import MapCache
from coordconv_patch.layers.new_weights import why_refused
from coordconv_patch.layers.padding_probe import padding_of, pads_as_torch
from coordconv_patch.layers.replaced_forward import ReplacedForward
from coordconv_patch.layers.unsupported import refuse_mkldnn, refuse_script
from coordconv_patch.layers.weight_marks import WeightMark, is_plain
from coordconv_patch.running.inputs import check_is_module

__all__ = [
    "CoordConv1d",
    "CoordConv2d",
    "CoordConv3d",
    "CoordConvNd",
    "CoordConvTranspose1d",
    "CoordConvTranspose2d",
    "CoordConvTranspose3d",
    "coord_layers",
    "new_coord_weight",
    "patched_class",
]

_MAP_ATTRIBUTES = frozenset(
    {"coords", "coord_padding", "stride", "padding", "dilation", "padding_mode", "output_padding"}
)
"""Attributes of a layer that its coordinate map is made from, besides its weight."""

_NEVER_PADDING = frozenset(
    {"training", "coords", "coord_padding", "_map_cache", "forward", "_call_impl"}
    | {"site_name", "weight_mark"}
)
"""Attributes that tell nothing of how a layer pads."""

_CHANGED = "changed"
"""What a layer followed when something has changed since: equal to no method."""


class CoordConvNd(CoordLayer, _ConvNd):
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

    site_name: str = ""
    """Qualified name in the model that was patched, for messages."""
    weight_mark: WeightMark | None = None
    """What the weight was when it was last known to fit the coordinate weight."""
    _plain_class: type[_ConvNd]
    """The class that the layer has without coordinates."""
    __signature__: inspect.Signature
    _must_follow: bool = False
    """Whether something has changed since, as far as assignments tell."""
    _written_in_forward: frozenset[str] = frozenset()
    """Attributes that the plain forward writes, so what they hold is nobody's setting."""
    _written_in_probe: set[str] | None = None
    """Those that a probe has written so far; ``None`` while there is none."""
    _is_loading: bool = False
    """Whether a state_dict is being loaded, which may assign a new weight."""
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
        self._attach(convention, DECLARED, new_coord_weight(self, convention))
        self._note_change("padding")  # a subclass may pad in its own way

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
        if output.layout is not torch.strided:
            return self._add_to_mkldnn(input, output)
        # Microseconds count here: there may be fifty convolutions in ten milliseconds. A look
        # at the parameters is cheaper than nn.Module.__getattr__, which parametrizations need.
        weight = self._parameters.get("coord_weight")
        if weight is None:
            weight = self.coord_weight
        branch = self.map_for(input, output, weight)
        # In place where nobody can hold the output yet: it saves a copy of the activations.
        # Functional calls bring a tensor instead of the parameter, a vmapped one perhaps.
        if type(weight) is nn.Parameter and self._output_is_fresh:
            return output.add_(branch)
        return output + branch

    def _add_to_mkldnn(self, input: Tensor, output: Tensor) -> Tensor:
        """The sum where the input is an MKLDNN tensor; those know no sum with a map."""
        dense = output.to_dense()
        branch = self.compute_map(input, dense, self.coord_weight)
        return (dense + branch).to_mkldnn()

    def compute_map(self, input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """As :meth:`CoordLayer.compute_map`, in the output's dtype."""
        # The compiler cannot compare methods; a change that it would miss is marked.
        if (
            self._must_follow
            if torch.compiler.is_compiling()
            else self.__dict__.get("_conv_forward") is not self._followed
        ):
            self._follow_padding()
        ndim = len(self.kernel_size)
        input_size = input.shape[-ndim:]
        if suits_lines(input, weight, self.coords, self, self.coord_padding):
            branch = map_by_lines(input_size, weight, self.coords, self, self.coord_padding)
        else:
            output_padding = self.output_padding_of(input_size, output.shape[-ndim:])
            branch = self.compute_branch(input_size, output_padding, weight)
        branch = branch.to(output.dtype)
        return branch if output.dim() == ndim + 2 else branch.squeeze(0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and type(value) is nn.Parameter:
            self._check_new_weight(value)
        if name == "forward" and "_map_cache" in self.__dict__ and callable(value):
            value = ReplacedForward(self, value)
        before = self.__dict__.get(name, _CHANGED)
        super().__setattr__(name, value)
        if "_map_cache" not in self.__dict__:
            return
        if name in _MAP_ATTRIBUTES:
            self._map_cache.clear()
        if before is not value and not isinstance(value, Tensor):
            self._note_change(name)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if "_map_cache" in self.__dict__:
            self._note_change(name)

    def _note_change(self, name: str) -> None:
        """Follow a change of an attribute that the plain forward may read when it pads."""
        if self._written_in_probe is not None:
            self._written_in_probe.add(name)
        # What is set while the model is captured, its own code sets.
        elif not (
            name in _NEVER_PADDING
            or name.startswith("__")
            or name in self._written_in_forward
            or is_capturing()
        ):
            self.__dict__["_followed"], self.__dict__["_must_follow"] = _CHANGED, True
            # Half of a change may be one that no branch can follow; the next forward tells.
            with contextlib.suppress(PatchError):
                self._follow_padding()

    def _follow_padding(self) -> None:
        """Let the coordinates be padded as the plain forward pads now.

        Raises:
            PatchError: If they cannot be; or while the model is being captured.
        """
        forward = super().forward
        if not pads_as_torch(self, forward) and (is_capturing() or is_transforming()):
            raise PatchError(
                f"how {self._short_name()} pads was changed since it last ran: run the model once "
                "before it is compiled, traced, exported or transformed"
            )
        written = self.__dict__["_written_in_probe"] = set()
        try:
            padding = padding_of(self, forward)
        except PatchError as error:
            raise PatchError(
                f"the padding of {self._short_name()} was changed after it got coordinates, which "
                f"cannot follow: {error}. Undo the change, or unpatch the model first"
            ) from error
        finally:
            del self.__dict__["_written_in_probe"]
        self.__dict__["_written_in_forward"] = self._written_in_forward | written
        if padding != self.coord_padding:
            self.coord_padding = padding
        self.__dict__["_followed"] = self.__dict__.get("_conv_forward")
        self.__dict__["_must_follow"] = False

    def _short_name(self) -> str:
        return f"{type(self).__name__} ({ConvGeometry.of(self)})"

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        refuse_mkldnn(self)
        return super().named_children()

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script calls first.

        Raises:
            PatchError: Always, with what to do instead.
        """
        return refuse_script(self)

    def train(self, mode: bool = True) -> Any:
        """As torch's; at the end of a training the weight's mark is renewed, see weight_marks."""
        weight, mark = self._parameters.get("weight"), self.weight_mark
        ends = self.training and not mode
        # Written through .data only, a weight keeps its version, and the mark is still needed.
        if ends and weight is not None and mark is not None and weight._version != mark.version:
            self._mark_weight()
        return super().train(mode)

    def _mark_weight(self) -> None:
        weight, coords = self._parameters.get("weight"), self._parameters.get("coord_weight")
        self.weight_mark = None
        if is_plain(weight) and is_plain(coords):
            self.weight_mark = WeightMark.of(
                cast(Tensor, weight),
                cast(Tensor, coords),
                transposed=self.transposed,
                groups=self.groups,
                has_bias=self._parameters.get("bias") is not None,
            )

    def _check_new_weight(self, new: nn.Parameter) -> None:
        """Refuse another weight Parameter where it would leave trained coordinates behind.

        Code that folds batch norms, prunes channels or attributes relevance puts a new
        Parameter in the weight's place, and knows nothing of the coordinate weight.
        """
        old, coord_weight = self._parameters.get("weight"), self._parameters.get("coord_weight")
        if type(old) is not nn.Parameter or coord_weight is None or self._is_loading:
            return
        if any(tensor.is_meta for tensor in (old, new, coord_weight)) or not coord_weight.any():
            return
        reason = why_refused(old, new, transposed=self.transposed, groups=self.groups)
        if reason:
            raise PatchError(
                f"the weight of {self.site_name or 'a coordinate convolution'} is about to be "
                f"replaced, while its coordinate weight is not zero. {reason}"
            )

    def compute_branch(
        self,
        input_size: Sequence[int],
        output_padding: Sequence[int],
        weight: Tensor | None = None,
    ) -> Tensor:
        """The coordinate map for one input size.

        Args:
            input_size: Spatial size of the input, such as ``(H, W)``.
            output_padding: Of a transposed convolution, in pixels per dimension.
            weight: The coordinate weight; ``None``: the layer's.

        Returns:
            Shape ``(1, C_out, *output_size)``.
        """
        weight = self.coord_weight if weight is None else weight
        return coordinate_map(
            grid_for(weight, self.coords, input_size),
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
        self.__dict__["_is_loading"] = True
        try:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        finally:
            del self.__dict__["_is_loading"]
        self._map_cache.clear()
        if self.weight_mark is not None:
            self._mark_weight()
        zero_if_missing(self, state_dict, prefix, missing_keys)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is _PATCHED_CLASSES.get(self._plain_class):
            # The class was made at run time, so it is rebuilt from the class it stands on.
            return _new_layer, (self._plain_class,), self.__dict__
        return super().__reduce_ex__(protocol)

    def _attach(self, coords: Coordinates, padding: Padding, coord_weight: nn.Parameter) -> None:
        """Give a module that already is a convolution what makes it a coordinate convolution."""
        self.coords = coords
        self.coord_padding = padding
        self.__dict__["_followed"] = self.__dict__.get("_conv_forward")
        self._map_cache = MapCache()
        # torch.fx looks at the *instance's* __module__ to decide what to trace through:
        # convolutions are leaves there, and must stay leaves for everyone's tracer.
        self.__dict__["__module__"] = "torch.nn.modules.conv"
        self.coord_weight = coord_weight

    def _detach(self) -> None:
        """Inverse of :meth:`_attach`."""
        del self._parameters["coord_weight"]
        if isinstance(self.__dict__.get("forward"), ReplacedForward):
            self.__dict__["forward"] = self.__dict__["forward"].function
        for name in ("coords", "coord_padding", "_map_cache", "__module__"):
            del self.__dict__[name]
        for name in (
            *("_followed", "_must_follow", "_written_in_forward"),
            *("site_name", "weight_mark"),
        ):
            self.__dict__.pop(name, None)


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

_PATCHED_CLASSES: dict[type[_ConvNd], type[CoordConvNd]] = {}


def patched_class(plain: type[_ConvNd]) -> type[CoordConvNd]:
    """The class of a patched convolution, by the class that it had; the same one every time.

    A subclass of :class:`CoordConv2d` or one of the others. Called with arguments it makes a
    plain convolution: ``type(conv)(8, 8, 3)``, which PEFT writes to make its adapters, asks
    for another convolution like the one that it was written for.
    """
    if plain not in _PATCHED_CLASSES:
        base = _COORD_CLASSES.get(plain)
        made = type(
            f"Coord{plain.__name__}",
            (CoordConvNd, plain) if base is None else (base,),
            {
                "_plain_class": plain,
                "_output_is_fresh": base is not None,
                "__new__": _plain_layer_or_empty,
                "__doc__": f"{plain.__name__} with a coordinate branch, made by patching.",
            },
        )
        _PATCHED_CLASSES.setdefault(plain, made)  # another thread may have been faster
    return _PATCHED_CLASSES[plain]


def _plain_layer_or_empty(cls: type[CoordConvNd], *args: Any, **kwargs: Any) -> _ConvNd:
    if args or kwargs:
        return cls._plain_class(*args, **kwargs)
    return object.__new__(cls)  # for copying and unpickling


def _new_layer(plain: type[_ConvNd]) -> CoordConvNd:
    """An empty layer of the class that patching gives to ``plain``, for unpickling."""
    made = patched_class(plain)
    return made.__new__(made)


def new_coord_weight(module: _ConvNd, coords: Coordinates) -> nn.Parameter:
    """A coordinate weight of zeros for a convolution, on its weight's device and in its dtype."""
    geometry = ConvGeometry.of(module)
    shape = geometry.coord_weight_shape(coords.num_channels(geometry.ndim))
    weight = module.weight
    return nn.Parameter(torch.zeros(shape, device=weight.device, dtype=weight.dtype))


def coord_layers(model: nn.Module) -> dict[str, CoordConvNd | CoordBranch]:
    """Every layer of a model that holds a coordinate weight, by site name, each once.

    In order of registration.

    Raises:
        PatchError: If this is no module.
    """
    check_is_module(model)
    found: dict[str, CoordConvNd | CoordBranch] = {}
    for name, module in model.named_modules():
        if isinstance(module, CoordConvNd):
            found[name] = module
        elif isinstance(module, CoordBranch):
            # "conv1.coord_branch" belongs to site conv1, "w_coord_branch" to site w.
            found[name.removesuffix(BRANCH_NAME)[:-1]] = module
    return found
