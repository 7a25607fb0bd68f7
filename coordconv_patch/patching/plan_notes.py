"""What to know about a model's coordinates before it is patched, for a plan to show."""

from __future__ import annotations

from torch import nn

from coordconv_patch.errors import listing
from coordconv_patch.sites.roi_operators import roi_pools
from coordconv_patch.sites.site import SiteMap

__all__ = ["roi_notes"]


def roi_notes(site_map: SiteMap, model: nn.Module) -> tuple[str, ...]:
    """What a plan cannot tell of a model's regions of interest; none if it can, or has none."""
    pools = roi_pools(model)
    recorded = any(site.calls is not None for site in site_map.sites)
    if not pools or recorded or not site_map.untraced:
        return ()
    return (
        f"{listing(pools)}: convolutions behind pools of regions of interest have the coordinates "
        "of a box, not of the picture. Which these are is seen when the model runs: pass "
        "example_inputs=...",
    )
