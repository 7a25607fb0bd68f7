"""Lowerings that compute the branch apart, and add it to the convolution's output."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from coordconv_patch.layers.coord_layer import CoordLayer
from coordconv_patch.layers.coordconv import CoordConvNd
from coordconv_patch.layers.geometry import Call
from coordconv_patch.lowering.constants import CoordConstant
from coordconv_patch.lowering.lowering import Lowering, Stored, StoredCalls
from coordconv_patch.lowering.site import LoweringSite

__all__ = ["Sum"]


class Sum(Lowering):
    """``conv(x, W)`` plus a branch: what is left to say is how to compute the branch."""

    @abstractmethod
    def constant(self, site: LoweringSite, call: Call) -> CoordConstant:
        """What the branch of one call is computed from, see :meth:`.lowering.Lowering.constant`."""

    @abstractmethod
    def branch(self, layer: CoordLayer, stored: Stored, input: Tensor) -> Tensor:
        """The branch of one call.

        Args:
            layer: The layer, for its weight.
            stored: What it holds for the call.
            input: Its input, (N, C_in, *input_size) or unbatched.

        Returns:
            Shape (1, C_out, *output_size), or (N, C_out, *output_size).
        """

    def forward(self, site: LoweringSite, stored: StoredCalls) -> Callable[..., Tensor]:
        layer = site.layer
        if isinstance(layer, CoordConvNd):
            return functools.partial(self._sum, layer, stored)
        return functools.partial(self._branch_alone, layer, stored)

    def _sum(
        self, layer: CoordConvNd, stored: StoredCalls, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        output = layer._plain_class.forward(layer, input, *args, **kwargs)
        return output + self._branch_of(layer, stored.of(input, output.shape), input)

    def _branch_alone(self, layer: CoordLayer, stored: StoredCalls, input: Tensor) -> Tensor:
        return self._branch_of(layer, stored.of(input), input)

    def _branch_of(self, layer: CoordLayer, stored: Stored, input: Tensor) -> Tensor:
        branch = self.branch(layer, stored, input)
        return branch if input.dim() == branch.dim() else branch.squeeze(0)
