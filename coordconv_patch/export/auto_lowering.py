"""Which lowering ``lowering="auto"`` takes for a site, and why.

What counts is measured, see ``benchmarks/``. On the CPU, ONNX Runtime keeps activations in
blocks of 16 channels, and fuses the sum of two convolutions; a stored map would leave that
layout. What the branch costs there is a pass over the output and its multiplications, so the
form with fewer of them wins. On GPUs the addition of a stored map is fused with the
convolution or runs by itself at the speed of memory, and needs no multiplications at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from coordconv_patch.errors import ArgumentError, excerpt
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.lowering.site import LoweringSite
from coordconv_patch.runtime.providers import CPU

__all__ = ["Chooser", "accepted_lowerings", "check_lowering"]

MAX_GROWTH = 0.01
"""Of the bytes of the model's weights: more is never added in stored maps by ``"auto"``."""


@dataclass
class Chooser:
    """Chooses lowerings by the rule of ``"auto"``; called once for each site, in order.

    ``map_budget`` is the bytes of maps that may still be stored whole.
    """

    provider: str
    dynamic_size: bool
    map_budget: float = math.inf

    def __call__(self, site: LoweringSite) -> str:
        if self.dynamic_size:
            return "computed"
        if self.provider == CPU:
            return _cheaper_branch(site)
        if site.num_images is not None:  # stored as vectors and a weight; the runtime makes the map
            return "map"
        if site.map_bytes <= self.map_budget:
            self.map_budget -= site.map_bytes
            return "map"
        return "branch"


def _cheaper_branch(site: LoweringSite) -> str:
    """The form of the branch with fewer multiplications an output value.

    With as many images as taps, as in 1x1 convolutions, the strip is faster by itself (0.8 of
    the time), but not in a network: ResNet-50 with every convolution took 1.05 of the plain
    model's time instead of 1.02 (one thread), 1.06 to 1.12 instead of 1.02 to 1.05 (two).
    """
    images = site.num_images
    return "separable" if images is not None and images < site.num_taps else "branch"


def accepted_lowerings() -> tuple[str, ...]:
    """What ``export_onnx`` takes as ``lowering``."""
    return ("auto", "autotune", *LOWERINGS)


def check_lowering(lowering: str, dynamic_size: bool) -> None:
    """Raise an ArgumentError if there is no such lowering, or it cannot have the axes asked for."""
    choices = accepted_lowerings()
    if not isinstance(lowering, str) or lowering not in choices:
        raise ArgumentError(f"lowering={excerpt(lowering)}: write {', '.join(map(repr, choices))}")
    of_any_size = [name for name, form in LOWERINGS.items() if not form.fixes_size]
    if dynamic_size and lowering not in ("auto", *of_any_size):
        raise ArgumentError(
            f"lowering={lowering!r} stores coordinates of one size, but dynamic_size=True: write "
            f"lowering={', '.join(map(repr, of_any_size))} or 'auto'"
        )
    if lowering in of_any_size and not dynamic_size:
        raise ArgumentError(
            f"lowering={lowering!r} derives coordinates from the size at run time, but the size is "
            "fixed: write dynamic_size=True, or another lowering"
        )
