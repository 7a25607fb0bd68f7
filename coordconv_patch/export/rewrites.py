"""Which passes rewrite an exported graph, and in which order.

They follow from the :class:`~coordconv_patch.export.targets.Target`, and where that leaves it open
from the execution provider of ONNX Runtime. To have another pass run, add its class to the list of
its provider in :data:`REWRITES`.
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
from coordconv_patch.export.graph_passes.evaluate_constants import EvaluateConstants
from coordconv_patch.export.graph_passes.fold_scales import FoldScales
from coordconv_patch.export.graph_passes.forget_origins import ForgetOrigins
from coordconv_patch.export.graph_passes.fuse_clips import FuseClips
from coordconv_patch.export.graph_passes.order_additions import OrderAdditions
from coordconv_patch.export.graph_passes.read_zero import ReadZero
from coordconv_patch.export.graph_passes.refusals import Refusal, RewriteResult
from coordconv_patch.export.targets import ONNX_RUNTIME, Target
from coordconv_patch.lowering.lower import Lowered
from coordconv_patch.runtime.providers import CPU

__all__ = ["ANY_PROVIDER", "REWRITES", "passes_for", "rewrite_"]

ANY_PROVIDER: list[Callable[[], InPlacePass]] = [FoldScales, OrderAdditions]
"""What rewrites the sums with coordinates where no provider is known, in order."""

REWRITES: dict[str, list[Callable[[], InPlacePass]]] = {
    CPU: [CarryCoordinates, FoldScales, OrderAdditions, FuseClips],
}
"""What rewrites the sums with coordinates by execution provider, in order; others get
:data:`ANY_PROVIDER`.
"""


def passes_for(
    provider: str | None, lowered: Lowered, batch: int, target: Target = ONNX_RUNTIME
) -> tuple[InPlacePass, ...]:
    """The passes for a graph that an exporter made, in order.

    Args:
        provider: The execution provider that the graph is meant for; ``None``: any.
        lowered: What the lowering did.
        batch: That of the example.
        target: What the graph is meant for; it may name its rewrites itself.
    """
    rewrites: Sequence[Callable[[], InPlacePass]] = REWRITES.get(provider or "", ANY_PROVIDER)
    if target.rewrites is not None:
        rewrites = target.rewrites
    compact = CompactConstants(
        lowered.constants, lowered.kernels, batch, whole=target.whole_constants
    )
    return (
        LiftConstantsToInitializersPass(size_limit=0),
        ReadZero(),
        *(make() for make in rewrites),
        RemoveUnusedNodesPass(),
        compact,
        *([EvaluateConstants()] if target.whole_constants else []),
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
