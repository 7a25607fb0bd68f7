"""Coordinates that are padded as their convolution pads, also when that is changed later.

Code that has a patched model may give a convolution another ``padding`` or ``padding_mode``, or
put a method on the instance (seamless tiling of diffusion models). The layer takes note of
every attribute that is set or deleted, and looks again how its plain forward pads.
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
from coordconv_patch.layers.geometry import ConvGeometry, Convolution, Padding
from coordconv_patch.layers.padding_probe import padding_of, pads_as_torch

__all__ = ["PaddingFollower"]

_NEVER_PADDING = frozenset(
    {"training", "coords", "coord_padding", "_map_cache", "forward", "_call_impl"}
    | {"site_name", "weight_mark"}
)
"""Attributes that tell nothing of how a layer pads."""

_CHANGED = "changed"
"""What a layer followed when something has changed since: equal to no method."""


class PaddingFollower(CoordLayer, _ConvNd):
    """A convolution module with coordinates, which are padded as it pads its input."""

    _must_follow: bool = False
    """Whether something has changed since, as far as assignments tell."""
    _written_in_forward: frozenset[str] = frozenset()
    """Attributes that the plain forward writes, so what they hold is nobody's setting."""
    _written_in_probe: set[str] | None = None
    """Those that a probe has written so far; ``None`` while there is none."""

    @property
    def coord_geometry(self) -> ConvGeometry:  # type: ignore[override]  # a branch's can be set
        """The convolution's geometry, read from its attributes."""
        return ConvGeometry.of(self)

    @property
    def _convolution(self) -> Convolution:
        return self

    def compute_map(self, input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """As :meth:`CoordLayer.compute_map`, in the output's dtype."""
        # The compiler cannot compare methods; a change that it would miss is marked.
        if (
            self._must_follow
            if torch.compiler.is_compiling()
            else self.__dict__.get("_conv_forward") is not self._followed
        ):
            self._follow_padding()
        self.check_channels(output, weight)
        return super().compute_map(input, output, weight).to(output.dtype)

    def _attach(self, coords: Coordinates, padding: Padding, coord_weight: nn.Parameter) -> None:
        self.__dict__["_followed"] = self.__dict__.get("_conv_forward")
        super()._attach(coords, padding, coord_weight)

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name, _CHANGED)
        super().__setattr__(name, value)
        if before is value or isinstance(value, Tensor) or "_map_cache" not in self.__dict__:
            return
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
        return f"{type(self).__name__} ({self.coord_geometry})"
