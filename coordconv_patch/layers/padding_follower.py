"""Coordinates that are padded as their convolution pads, also when that is changed later.

Code that has a patched model may give a convolution another ``padding`` or ``padding_mode``, or
put a method on the instance or on the class (seamless tiling of diffusion models). The layer takes
note of every attribute that is set or deleted, looks at its class's methods at every call, and
then looks again how its plain forward pads. A forward that torch did not write may depend on
things elsewhere: it is watched, see :mod:`coordconv_patch.layers.forward_watch`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.capture import is_capturing, is_transforming
from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.forward_watch import CallRecord, ForwardWatch
from coordconv_patch.layers.geometry import (
    ConvGeometry,
    Convolution,
    Padding,
    each_axis,
    ndim_of,
)
from coordconv_patch.layers.padding_probe import (
    TORCHS_OWN,
    padding_of,
    pads_as_torch,
    pads_by,
)

__all__ = ["PaddingFollower"]

_NEVER_PADDING = frozenset(
    {"training", "coords", "coord_padding", "_map_cache", "forward", "_call_impl"}
    | {"site_name", "weight_mark", "_accepted_forward"}
)
"""Attributes that tell nothing of how a layer pads."""

_NUMBERS = ("kernel_size", "stride", "padding", "dilation", "output_padding")
"""What torch takes as one integer, too."""

_CHANGED = "changed"
"""What a layer followed when something has changed since: equal to no method."""


class PaddingFollower(CoordLayer, _ConvNd):
    """A convolution module with coordinates, which are padded as it pads its input."""

    _must_follow: bool = False
    """Whether something has changed since, as far as assignments tell."""
    _written_in_forward: frozenset[str] = frozenset()
    """Attributes that the plain forward writes, so what they hold is nobody's setting."""
    _watch: ForwardWatch | None = None
    """What the plain forward did; ``None``: it is torch's own, which its attributes tell all of."""
    _looking: ForwardWatch | None = None
    """The watch that is being made; ``None`` while the layer does not look how it pads."""
    _plain_class: type[_ConvNd]
    """The class that the layer has without coordinates."""
    _torchs: tuple[Any, Any, Any] = (None, None, None)
    """The plain class, and the ``forward`` and ``_conv_forward`` that torch wrote for its kind."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base, methods in TORCHS_OWN.items():
            if issubclass(cls, base):
                cls._torchs = (cls._plain_class, *methods)

    @property
    def coord_geometry(self) -> ConvGeometry:  # type: ignore[override]  # a branch's can be set
        """The convolution's geometry, read from its attributes."""
        return ConvGeometry.of(self)

    @property
    def _convolution(self) -> Convolution:
        return self

    def compute_map(self, input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """As :meth:`CoordLayer.compute_map`, in the output's dtype."""
        is_compiling = torch.compiler.is_compiling()
        if not (self._is_followed_in_graphs() if is_compiling else self._is_followed()):
            self._follow_padding()
        self.check_channels(output, weight)
        return super().compute_map(input, output, weight).to(output.dtype)

    def _watched_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The plain forward of a class or method that torch did not write.

        Raises:
            PatchError: If it pads otherwise than before, and the coordinates cannot follow.
        """
        watch = self._watch
        if watch is None or is_capturing() or is_transforming():
            return super().forward(input, *args, **kwargs)
        with CallRecord(input) as record:
            output = super().forward(input, *args, **kwargs)
        size = tuple(input.shape[-ndim_of(self) :])
        key = (size, self.training)
        if not watch.knows(key, record.calls):
            self._check_padding(size)
            watch = self._watch  # a new one, where another padding was followed
            if watch is not None:
                watch.note(key, record.calls)
        return output

    def _is_followed(self) -> bool:
        # Tenths of a microsecond count here: every forward asks.
        plain, forward, conv_forward = self._torchs
        return self.__dict__.get("_conv_forward") is self._followed and (
            (plain.forward is forward and type(self)._conv_forward is conv_forward)
            or self._watch is not None
        )

    def _is_followed_in_graphs(self) -> bool:
        """As :meth:`_is_followed`, for the compiler, which cannot compare bound methods.

        A change that it would miss is marked.
        """
        plain, forward, conv_forward = type(self)._torchs  # old compilers ask classes alone
        return not self._must_follow and (
            (plain.forward is forward and type(self)._conv_forward is conv_forward)
            or self._watch is not None
        )

    def _attach(self, coords: Coordinates, padding: Padding, coord_weight: nn.Parameter) -> None:
        for name in _NUMBERS:
            value = self.__dict__[name]
            if not isinstance(value, (str, tuple)):
                self.__dict__[name] = each_axis(value, ndim_of(self))
        self.__dict__["_followed"] = self.__dict__.get("_conv_forward")
        if not pads_as_torch(self, super().forward):
            self.__dict__["_watch"] = ForwardWatch()
        super()._attach(coords, padding, coord_weight)

    def train(self, mode: bool = True) -> Any:
        """As torch's; a forward that torch did not write may pad otherwise in training."""
        is_other = self.training != mode
        super().train(mode)
        if is_other and self._watch is not None and not (is_capturing() or is_transforming()):
            # What cannot be looked at now is at the next forward, which tells what is wrong.
            with contextlib.suppress(PatchError):
                self._check_padding(self._small_size())
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        has_coords = "_map_cache" in self.__dict__
        if has_coords and name == "__class__" and not issubclass(value, PaddingFollower):
            raise PatchError(
                f"{self._site_name} has coordinates, of which the class {value.__name__} knows "
                "nothing: unpatch the model first, and patch it when its convolutions have their "
                "classes"
            )
        if name in _NUMBERS and not isinstance(value, (str, tuple)):
            value = each_axis(value, ndim_of(self))
        before = self.__dict__.get(name, _CHANGED)
        super().__setattr__(name, value)
        if before is value or isinstance(value, Tensor) or not has_coords:
            return
        self._note_change(name)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if "_map_cache" in self.__dict__:
            self._note_change(name)

    def _note_change(self, name: str) -> None:
        """Follow a change of an attribute that the plain forward may read when it pads."""
        if self._looking is not None:
            self._looking.written.add(name)
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
        watch = self.__dict__["_looking"] = ForwardWatch()
        try:
            padding = padding_of(self, forward)
        except PatchError as error:
            raise PatchError(
                f"the padding of {self._short_name()} was changed after it got coordinates, which "
                f"cannot follow: {error}. Undo the change, or unpatch the model first"
            ) from error
        finally:
            del self.__dict__["_looking"]
        self.__dict__["_written_in_forward"] = self._written_in_forward | watch.written
        if padding != self.coord_padding:
            self.coord_padding = padding
        self.__dict__["_watch"] = None if pads_as_torch(self, forward) else watch
        self.__dict__["_followed"] = self.__dict__.get("_conv_forward")
        self.__dict__["_must_follow"] = False

    def _check_padding(self, size: tuple[int, ...]) -> None:
        """Look whether inputs of a size are still padded as the coordinates are, and follow.

        Raises:
            PatchError: If they cannot follow.
        """
        weight = self._parameters.get("weight")
        if weight is not None and (weight.is_meta or hasattr(weight, "device_mesh")):
            return  # hooks bring it, and no probe would reach it here
        if not self._pads_by_its_rule(size):
            self.__dict__["_followed"], self.__dict__["_must_follow"] = _CHANGED, True
            self._follow_padding()
            if not self._pads_by_its_rule(size):
                self.__dict__["_followed"], self.__dict__["_must_follow"] = _CHANGED, True
                raise PatchError(
                    f"{self._short_name()} pads an input of size {size} by another rule than "
                    "smaller ones; its coordinates could not follow. Let its forward pad all sizes "
                    "alike, or unpatch the model first"
                )

    def _pads_by_its_rule(self, size: tuple[int, ...]) -> bool:
        forward = super().forward
        if pads_as_torch(self, forward):
            return self._watch is None
        return pads_by(self, forward, size, self.coord_padding)

    def _small_size(self) -> tuple[int, ...]:
        """A small input size at which all padding rules that are known differ."""
        geometry = ConvGeometry.of(self)
        numbers = zip(geometry.kernel_size, geometry.dilation, geometry.stride, strict=True)
        return tuple(spacing * (taps - 1) + 2 * step + 2 for taps, spacing, step in numbers)

    def _short_name(self) -> str:
        return f"{type(self).__name__} ({self.coord_geometry})"
