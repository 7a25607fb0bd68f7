"""The coordinate branch as a module of its own, added to the output of a plain convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coordconv_patch.layers.coord_layer import CoordLayer, new_coord_weight
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.geometry import DECLARED, ConvGeometry, Padding

__all__ = ["BRANCH_NAME", "CoordBranch", "branch_name", "site_of_branch"]

BRANCH_NAME = "coord_branch"
"""Name of the submodule that a :class:`CoordBranch` is added under."""


class CoordBranch(CoordLayer):
    """The branch alone: added to a functional convolution, or to chosen calls of a module.

    Args:
        geometry: Geometry of the convolution whose output it is added to.
        coords: The convention of the coordinate channels.
        padding: How the convolution pads its input, where its geometry does not say it.
        device: Where the coordinate weight lives.
        dtype: Its dtype.

    Shape:
        - input: the convolution's input, ``(N, C_in, *input_size)`` or unbatched.
        - output: ``(1, C_out, *output_size)``, unbatched if the input is.
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
        self.coord_geometry = geometry
        weight = new_coord_weight(geometry, coords, device=device, dtype=dtype)
        self._attach(coords, padding, weight)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel size of the convolution, as a convolution module has it."""
        return self.coord_geometry.kernel_size

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
        """As :meth:`CoordLayer.compute_map`; the output may be the input, its size is not used."""
        branch = super().compute_map(input, output, weight)
        if input.layout is not torch.strided:  # MKLDNN tensors add only to their like
            return branch.expand(len(input), *branch.shape[1:]).contiguous().to_mkldnn()
        return branch

    def output_padding_of(
        self, input_size: Sequence[int], output_size: Sequence[int]
    ) -> tuple[int, ...]:
        """That of the geometry: a functional convolution is told it, and takes no output size."""
        return self.coord_geometry.output_padding

    def extra_repr(self) -> str:
        return f"{self.coord_geometry}, coords={self.coords}"

    @classmethod
    def _site_of(cls, name: str) -> str:
        return site_of_branch(name)


def branch_name(owner: nn.Module, site: str) -> str:
    """Where a site's branch goes: into the module that the site is named after, or beside.

    Args:
        owner: The module that calls the convolution.
        site: The site's name relative to it; ``""`` if they have one name.
    """
    if not site:
        return BRANCH_NAME
    is_module = site in dict(owner.named_modules())
    return f"{site}.{BRANCH_NAME}" if is_module else f"{site}_{BRANCH_NAME}"


def site_of_branch(name: str) -> str:
    """The site of a branch: conv1 of ``conv1.coord_branch``, w of ``w_coord_branch``."""
    return name.removesuffix(BRANCH_NAME)[:-1]
