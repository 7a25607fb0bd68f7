"""Choices of sites that have a name in ``where=``: the first, the stem, the neck, the heads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from coordconv_patch.arguments import check_callable, check_word
from coordconv_patch.errors import ArgumentError, SelectionError, listing
from coordconv_patch.sites.site import Site, SiteMap

__all__ = ["PRESETS", "first_site", "register_selector", "unusable"]


def first_site(site_map: SiteMap) -> list[Site]:
    """The convolution that runs first, alone; a SelectionError if there is none to tell."""
    first = site_map.sites[0]
    if all(site.obstacle for site in site_map.sites):
        raise SelectionError(unusable("'first'", site_map.sites))
    if not site_map.order_known:
        raise SelectionError(
            "cannot tell which convolution runs first: the model cannot be traced whole "
            f"({site_map.untraced}). Pass example_inputs=..., or name the site; the first "
            f"registered one is {first.name!r}"
        )
    if first.order is None:
        raise SelectionError("no convolution is executed in the forward pass")
    return [first]


def unusable(selector: str, matched: Sequence[Site]) -> str:
    """Why none, or not all, of the sites that a selector describes can be patched.

    ``selector`` is the selector as messages show it.
    """
    if all(site.patched for site in matched):
        names = listing(site.name for site in matched)
        return (
            f"where={selector}: already patched: {names}. Choose other sites, or unpatch the model "
            "first"
        )
    lines = [
        f"  {site.name or 'the model'}: {'already patched' if site.patched else site.obstacle}"
        for site in matched
        if site.patched or site.obstacle
    ]
    return f"where={selector} cannot be patched:\n" + "\n".join(lines)


def _neck(site_map: SiteMap) -> list[Site]:
    return [
        site
        for site in site_map.sites
        if _in_module_named(site.name, _NECK) and set(site.kernel_size) == {1}
    ]


def _head(site_map: SiteMap) -> list[Site]:
    firsts: dict[str, Site] = {}
    for site in site_map.sites:
        tower = _in_module_named(site.name, _HEAD)
        if tower:
            firsts.setdefault(tower, site)
    return list(firsts.values())


_NECK = re.compile(r"(fpn|neck|pan|bifpn|\w+_(fpn|neck)|(fpn|neck)_\w+)", re.IGNORECASE)
_HEAD = re.compile(r"(heads?|decode_head|detect|\w+_head|head_\w+)", re.IGNORECASE)


def _in_module_named(name: str, pattern: re.Pattern[str]) -> str:
    """The name up to its innermost module that matches, ``""`` if none does."""
    parts = name.split(".")[:-1]
    for end in range(len(parts), 0, -1):
        if pattern.fullmatch(parts[end - 1]):
            return ".".join(parts[:end])
    return ""


PRESETS: dict[str, Callable[[SiteMap], list[Site]]] = {
    "stem": first_site,
    "neck": _neck,
    "head": _head,
}
"""Named choices that the literature backs.

- ``"stem"``: the first executed convolution, where the paper puts coordinates for
  ImageNet and detection.
- ``"neck"``: every 1x1 convolution of a module called fpn, neck, pan, ... (PP-YOLO,
  https://arxiv.org/abs/2007.12099).
- ``"head"``: the first convolution of each detection or segmentation head (PP-YOLO;
  SOLO, https://arxiv.org/abs/1912.04488).
"""


def register_selector(name: str, choose: Callable[[SiteMap], list[Site]]) -> None:
    """Let ``where=`` take one more name.

    For choices that need to see all sites at once. One that looks at a site alone needs no name:
    ``where=`` takes a callable.

    Args:
        name: What ``where=`` is to take, such as ``"last"``.
        choose: Gives the sites of a model that the name means; none, if it means none there.

    Raises:
        ArgumentError: If the name is not a plain word, or is taken.
    """
    check_word("name", name)
    if name in ("first", "all", *PRESETS):
        raise ArgumentError(f"name={name!r}: where= has a selector of this name")
    check_callable("choose", choose)
    PRESETS[name] = choose
