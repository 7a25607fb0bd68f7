"""What to know about a model's coordinates before it is patched, for a plan to show."""

from __future__ import annotations

from torch import nn

from coordconv_patch.errors import listing
from coordconv_patch.followers.padded_batches import is_padding_transform, takes_mask
from coordconv_patch.sites.roi_operators import roi_pools
from coordconv_patch.sites.site import SiteMap

__all__ = ["notes_on", "roi_notes"]


def notes_on(site_map: SiteMap, model: nn.Module) -> tuple[str, ...]:
    """All that a plan notes of a model.

    Args:
        site_map: Its sites.
        model: The model.
    """
    return (*roi_notes(site_map, model), *_padding_notes(model))


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


def _padding_notes(model: nn.Module) -> tuple[str, ...]:
    """That pictures of several sizes are padded to one, if the model or its code for batches does.

    Torchvision's detectors do it themselves; models of transformers are told by ``pixel_mask``
    which part of each picture is real.
    """
    padding = _who_pads(model)
    if not padding:
        return ()
    return (
        f"{padding}: a picture's coordinates then depend on the pictures that it is padded beside, "
        "unless places are followed: follow_padding_(model)",
    )


def _who_pads(model: nn.Module) -> str:
    masked: dict[type, bool] = {}
    for name, module in model.named_modules():
        if is_padding_transform(module):
            return f"{name or 'the model'} pads its batches"
        if type(module) not in masked:
            masked[type(module)] = takes_mask(module)
        if masked[type(module)]:
            return f"{name or 'the model'} takes padded batches and a pixel_mask"
    return ""
