"""The layers that carry a coordinate branch: CoordConv, drop-in for torch.nn's convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.concatenated_weight import taken_apart
from coordconv_patch.layers.coord_layer import new_coord_weight
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import DECLARED, output_padding_between
from coordconv_patch.layers.new_weights import coords_with, groups_of, rows_of_each, why_refused
from coordconv_patch.layers.padding_follower import PaddingFollower
from coordconv_patch.layers.replaced_forward import ReplacedForward, look_at_forward
from coordconv_patch.layers.weight_marks import WeightMark, is_plain

__all__ = [
    "CoordConv1d",
    "CoordConv2d",
    "CoordConv3d",
    "CoordConvNd",
    "CoordConvTranspose1d",
    "CoordConvTranspose2d",
    "CoordConvTranspose3d",
]


class CoordConvNd(PaddingFollower):
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
    __signature__: inspect.Signature
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
        device, dtype = self.weight.device, self.weight.dtype
        coord_weight = new_coord_weight(self.coord_geometry, convention, device=device, dtype=dtype)
        self._attach(convention, DECLARED, coord_weight)
        self._note_change("padding")  # a subclass may pad in its own way

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution plus the coordinate branch.

        Args:
            input: Shape ``(N, C_in, *input_size)``, or ``(C_in, *input_size)``.
            *args: Passed on to the plain class (``output_size`` of a transposed one).
            **kwargs: Passed on too.

        Returns:
            Tensor of the shape and dtype that the plain convolution returns.
        """
        if self._watch is None:
            output = super().forward(input, *args, **kwargs)
        else:
            output = self._watched_forward(input, *args, **kwargs)
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
        if type(weight) is nn.Parameter and self._output_is_fresh and self._watch is None:
            return output.add_(branch)
        return output + branch

    def _add_to_mkldnn(self, input: Tensor, output: Tensor) -> Tensor:
        """The sum where the input is an MKLDNN tensor; those know no sum with a map."""
        dense = output.to_dense()
        branch = self.compute_map(input, dense, self.coord_weight)
        return (dense + branch).to_mkldnn()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and type(value) is nn.Parameter:
            coords = self._coords_beside(value)
            super().__setattr__(name, value)
            if coords is not None:
                self.coord_weight = coords
                self._mark_weight()
            return
        if name == "forward" and "_map_cache" in self.__dict__ and callable(value):
            value = ReplacedForward(self, value)
        super().__setattr__(name, value)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; a forward that was put into the ``__dict__`` is looked at first."""
        if "forward" in self.__dict__ and not torch.compiler.is_dynamo_compiling():
            look_at_forward(self)
        return super()._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Any:
        """As torch's; at the end of a training the weight's mark is renewed, see weight_marks."""
        mark = self.weight_mark
        if self.training and not mode and mark is not None:
            now = self._mark_of_now()
            self.weight_mark = mark if now is None else mark.after_training(now)
        return super().train(mode)

    def _mark_weight(self) -> None:
        self.weight_mark = self._mark_of_now()

    def _mark_of_now(self) -> WeightMark | None:
        """A mark of the weights as they are; ``None`` if they are sharded, fake or computed."""
        weight, coords = self._parameters.get("weight"), self._parameters.get("coord_weight")
        if not is_plain(weight) or not is_plain(coords):
            return None
        filters, coord_filters = cast(Tensor, weight), cast(Tensor, coords)
        return WeightMark.of(
            filters,
            coord_filters,
            transposed=self.transposed,
            groups=groups_of(filters, filters, coord_filters, transposed=self.transposed),
            has_bias=self._parameters.get("bias") is not None,
        )

    def _coords_beside(self, new: nn.Parameter) -> nn.Parameter | None:
        """The coordinate weight that fits another weight Parameter; ``None``: as it is.

        Code that folds batch norms, prunes channels or attributes relevance puts a new
        Parameter in the weight's place, and knows nothing of the coordinate weight. Output
        channels that go take their coordinates along.

        Raises:
            PatchError: If trained coordinates would be left behind.
        """
        old, coord_weight = self._parameters.get("weight"), self._parameters.get("coord_weight")
        if type(old) is not nn.Parameter or coord_weight is None or self._is_loading:
            return None
        if any(tensor.is_meta for tensor in (old, new, coord_weight)):
            return None
        is_trained = bool(coord_weight.any())
        if not is_trained and (old.shape == new.shape or old.dim() != new.dim()):
            return None
        before, after = rows_of_each(old, new, coord_weight, transposed=self.transposed)
        coords = coords_with(before, after, coord_weight, transposed=self.transposed)
        if coords is not None:
            return coords
        reason = why_refused(before, after) if is_trained else ""
        if reason:
            raise PatchError(
                f"the weight of {self._site_name} is about to be "
                f"replaced, while its coordinate weight is not zero. {reason}"
            )
        return None

    def output_padding_of(
        self, input_size: Sequence[int], output_size: Sequence[int]
    ) -> tuple[int, ...]:
        """As :meth:`CoordLayer.output_padding_of`."""
        if not self.transposed:
            return ()
        return output_padding_between(self, input_size, output_size)

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
        image, coordinates = taken_apart(weight, self.in_channels, transposed=self.transposed)
        self.weight.copy_(image)
        self.coord_weight.copy_(coordinates)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def _require_one_group(self) -> None:
        if self.groups != 1:
            raise PatchError(
                f"a convolution with groups={self.groups} has no concatenated form: its groups "
                "do not see the same channels"
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_is_loading"] = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del self.__dict__["_is_loading"]
        if self.weight_mark is not None:
            self._mark_weight()

    def _detach(self) -> None:
        """Take away what makes it a coordinate convolution: the inverse of :meth:`_attach`."""
        del self._parameters["coord_weight"]
        if isinstance(self.__dict__.get("forward"), ReplacedForward):
            self.__dict__["forward"] = self.__dict__["forward"].function
        for name in ("coords", "coord_padding", "_map_cache", "__module__"):
            del self.__dict__[name]
        for name in (
            *("_followed", "_must_follow", "_written_in_forward", "_watch"),
            *("site_name", "weight_mark", "_places", "_accepted_forward", "_made_from"),
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
