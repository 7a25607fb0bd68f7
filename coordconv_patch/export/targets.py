"""Which passes rewrite an exported graph, and in which order.

A target is what a graph is meant for: the name of an execution provider of ONNX Runtime. To have
another pass run, add its class to the list of its target in :data:`REWRITES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx_ir import Model
from onnx_ir.passes import InPlacePass
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
)

from coordconv_patch.export.graph_passes.carry_coordinates import CarryCoordinates
from coordconv_patch.export.graph_passes.compact_constants import CompactConstants
from coordconv_patch.export.graph_passes.fold_scales import FoldScales
from coordconv_patch.export.graph_passes.forget_origins import ForgetOrigins
from coordconv_patch.export.graph_passes.fuse_clips import FuseClips
from coordconv_patch.export.graph_passes.order_additions import OrderAdditions
from coordconv_patch.export.graph_passes.refusals import Refusal, RewriteResult
from coordconv_patch.lowering.lower import Lowered
from coordconv_patch.runtime.providers import CPU

__all__ = ["ANY_TARGET", "REWRITES", "passes_for", "rewrite_"]

ANY_TARGET: list[Callable[[], InPlacePass]] = [FoldScales, OrderAdditions]
"""What rewrites the sums with coordinates where no target is known, in order."""

REWRITES: dict[str, list[Callable[[], InPlacePass]]] = {
    CPU: [CarryCoordinates, FoldScales, OrderAdditions, FuseClips],
}
"""What rewrites the sums with coordinates by target, in order; others get :data:`ANY_TARGET`."""


def passes_for(target: str | None, lowered: Lowered, batch: int) -> tuple[InPlacePass, ...]:
    """The passes for a graph that an exporter made, in order.

    The target is the execution provider that the graph is meant for, ``None`` for any; the batch
    is that of the example.
    """
    rewrites = ANY_TARGET if target is None else REWRITES.get(target, ANY_TARGET)
    return (
        LiftConstantsToInitializersPass(size_limit=0),
        *(make() for make in rewrites),
        RemoveUnusedNodesPass(),
        CompactConstants(lowered.constants, lowered.kernels, batch),
        NameFixPass(),  # quantizers are told nodes by their names
        ForgetOrigins(),
    )


def rewrite_(model: Model, passes: Sequence[InPlacePass]) -> tuple[Refusal, ...]:
    """Run passes on a graph, in place; returns what they left alone."""
    refusals: list[Refusal] = []
    for each in passes:
        result = each(model)
        if isinstance(result, RewriteResult):
            refusals += result.refusals
    return tuple(refusals)
