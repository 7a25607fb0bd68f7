"""The header of a coordinate-weights file: what is saved beside the tensors, as JSON.

It says which convolutions the weights belong to, what coordinates these see, and which base
model they were trained with. Everything is checked in itself when it is read; whether it fits a
model is not this module's concern.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordconv_patch.errors import ArgumentError, CoordConvPatchError, excerpt
from coordconv_patch.files.fields import choice, mapping, text, whole
from coordconv_patch.files.strict_json import parse
from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import ConvGeometry
from coordconv_patch.owners.owned_calls import OwnedCalls
from coordconv_patch.version import __version__

__all__ = ["FORMAT", "FORMAT_VERSION", "Header", "SiteRecord", "refuse_newer"]

FORMAT = "coordconv_patch"
FORMAT_VERSION = 3
"""2 added chosen calls; 3 the checksum, which is due since then, and functional calls."""
_FIRST_WITH_CHECKSUM = 3
_MOST_SITES = 10_000
"""Convolutions of a model: the largest known have about a thousand."""


@dataclass(frozen=True)
class SiteRecord:
    """What a file tells of one convolution.

    Attributes:
        geometry: The convolution's.
        coords: The convention of its coordinate channels.
        chosen_calls: Which of its calls have coordinates; ``None``: every one.
        function: Of a functional convolution in a plain module, which calls it is.
    """

    geometry: ConvGeometry
    coords: Coordinates
    chosen_calls: ChosenCalls | None = None
    function: OwnedCalls | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the coordinate weight."""
        channels = self.coords.num_channels(self.geometry.ndim)
        return self.geometry.coord_weight_shape(channels)

    def to_dict(self) -> dict[str, Any]:
        """The record, JSON-ready."""
        coords = Coordinates.to_dict(self.coords)  # which refuses subclasses
        fields: dict[str, Any] = {"geometry": self.geometry.to_dict(), "coords": coords}
        if self.chosen_calls is not None:
            fields["calls"] = self.chosen_calls.to_dict()
        if self.function is not None:
            fields["function"] = self.function.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: object) -> SiteRecord:
        """Inverse of :meth:`to_dict`, from parsed JSON, which may hold anything; or raises."""
        values = mapping(fields, "the record", ("geometry", "coords"), ("calls", "function"))
        geometry = ConvGeometry.from_dict(values["geometry"])
        coords = Coordinates.from_dict(values["coords"])
        coords.channel_names(geometry.ndim)  # refuses a window of other dimensions
        calls = ChosenCalls.from_dict(values["calls"]) if "calls" in values else None
        function = OwnedCalls.from_dict(values["function"]) if "function" in values else None
        return cls(geometry, coords, calls, function)


@dataclass(frozen=True)
class Header:
    """What a file tells of each convolution, and the base model's fingerprint (64 digits).

    ``needs_checksum``: whether its format version says that a checksum is due.
    """

    sites: Mapping[str, SiteRecord]
    fingerprint: str
    needs_checksum: bool = True

    def to_json(self) -> str:
        """The header as the newest format has it."""
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "fingerprint": self.fingerprint,
            "sites": {name: record.to_dict() for name, record in self.sites.items()},
        }
        # A convolution's numbers may be numpy's.
        return json.dumps(fields, default=operator.index)

    @classmethod
    def from_json(cls, header: str) -> Header:
        """Inverse of :meth:`to_json`, also of older formats; the text may be anything.

        A CoordConvPatchError says why if it is not such a header, or a newer one.
        """
        fields = parse(header, "its header")
        _refuse_newer(fields)
        names = ("format", "format_version", "package_version", "fingerprint", "sites")
        values = mapping(fields, "its header", names)
        choice(values["format"], "format", (FORMAT,))
        text(values["package_version"], "package_version")
        fingerprint = text(values["fingerprint"], "fingerprint")
        if not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise ArgumentError(
                f"fingerprint must be 64 hexadecimal digits, not {excerpt(fingerprint)}"
            )
        version = whole(values["format_version"], "format_version", low=1)
        return cls(_sites(values["sites"]), fingerprint, version >= _FIRST_WITH_CHECKSUM)


def refuse_newer(header: str) -> None:
    """Raise an ArgumentError that names a newer format; such a header may look otherwise."""
    try:
        fields = parse(header, "its header")
    except ArgumentError:
        return
    _refuse_newer(fields)


def _refuse_newer(fields: object) -> None:
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if isinstance(fields, dict) and type(version) is int and version > FORMAT_VERSION:
        raise ArgumentError(
            f"it has format version {version}, this package reads up to {FORMAT_VERSION}: update "
            f"coordconv-patch (the file was written by {excerpt(fields.get('package_version'))})"
        )


def _sites(value: object) -> dict[str, SiteRecord]:
    if not isinstance(value, dict) or not 0 < len(value) <= _MOST_SITES:
        raise ArgumentError(
            f"sites must be an object of 1 to {_MOST_SITES:,} sites, not {excerpt(value)}"
        )
    return {text(name, "the name of a site"): _site(name, each) for name, each in value.items()}


def _site(name: str, fields: object) -> SiteRecord:
    try:
        return SiteRecord.from_dict(fields)
    except CoordConvPatchError as error:
        raise ArgumentError(f"site {excerpt(name)}: {error}") from error
