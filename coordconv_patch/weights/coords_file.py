"""A file of coordinate weights, read: what its header says, and the tensors that belong to it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coordconv_patch.errors import CoordConvPatchError, WeightsError, excerpt
from coordconv_patch.files.tensor_file import check_storable, read_tensor_file
from coordconv_patch.weights.header import FORMAT, Header, SiteRecord, refuse_newer

__all__ = ["COORD_SUFFIX", "CoordsFile", "read_coords_file"]

COORD_SUFFIX = ".coord_weight"
"""What a weight's name in the file has after the site's."""


@dataclass(frozen=True)
class CoordsFile:
    """A file, read and checked in itself.

    By site name, ``sites`` holds what its header tells of each convolution, and ``weights`` the
    coordinate weights, of the shapes told there; ``batch_norm`` holds the other tensors by
    qualified buffer name. The fingerprint is that of the base model.
    """

    path: Path
    sites: Mapping[str, SiteRecord]
    weights: dict[str, Tensor]
    batch_norm: dict[str, Tensor]
    fingerprint: str


def read_coords_file(path: Path) -> CoordsFile:
    """Read a file that :func:`coordconv_patch.save_coords` wrote.

    Raises:
        WeightsError: If it is not such a file, damaged, or of a newer format; says why.

    Warns:
        UserWarning: If it has no checksum; the user is told whose code called load_coords.
    """
    stored = read_tensor_file(path, FORMAT)
    try:
        if stored.is_intact is False:
            refuse_newer(stored.header)  # whose checksum may be another one
            raise WeightsError(
                "it is damaged: its content is not what its checksum was made from. Take an "
                "intact copy, or save the weights again"
            )
        header = Header.from_json(stored.header)
        if header.needs_checksum and stored.is_intact is None:
            raise WeightsError("it is damaged: its checksum is missing")
        weights = _weights(header.sites, stored.tensors)
        for name, tensor in stored.tensors.items():
            check_storable(name, tensor)
    except CoordConvPatchError as error:
        raise WeightsError(f"{path}: {error}") from error
    if stored.is_intact is None:
        warnings.warn(
            f"{path} has no checksum, because an early version of coordconv_patch wrote it: damage "
            "to its numbers would go unnoticed. To add one, save the loaded model with "
            "save_coords",
            stacklevel=4,
        )
    others = {name: tensor for name, tensor in stored.tensors.items() if name not in weights}
    return CoordsFile(
        path,
        header.sites,
        {name.removesuffix(COORD_SUFFIX): tensor for name, tensor in weights.items()},
        others,
        header.fingerprint,
    )


def _weights(sites: Mapping[str, SiteRecord], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The coordinate weights among a file's tensors, by their names there."""
    weights = {}
    for name, record in sites.items():
        weight = tensors.get(name + COORD_SUFFIX)
        if weight is None:
            raise WeightsError(f"it holds no weight for the site {excerpt(name)}")
        if not weight.dtype.is_floating_point:
            raise WeightsError(f"the weight of {name} has dtype {weight.dtype}, not one of floats")
        if tuple(weight.shape) != record.weight_shape:
            raise WeightsError(
                f"the weight of {name} has shape {tuple(weight.shape)}, its header says "
                f"{record.weight_shape}"
            )
        weights[name + COORD_SUFFIX] = weight
    return weights
