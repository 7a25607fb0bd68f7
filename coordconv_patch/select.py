"""``where=`` selectors: from a description to sites.

A selector says which sites of a model get coordinates. Those that name one site
(``"first"``, an exact name) insist on it: a site that cannot be patched is an
error. Those that describe many (``"all"``, globs, types, ...) take what can be
patched and say of the rest why not. A selector that matches nothing is an error
that names what is close.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from coordconv_patch.errors import SelectionError, listing
from coordconv_patch.sites import Site, SiteMap

__all__ = ["PRESETS", "Choice", "Where", "select"]

Selector: TypeAlias = "str | type[nn.Module] | Callable[[Site], bool]"
Where: TypeAlias = "Selector | Sequence[Selector]"
"""What ``where=`` may be."""


@dataclass(frozen=True)
class Choice:
    """Whether a site was chosen, and why (not)."""

    site: Site
    chosen: bool
    reason: str


def select(site_map: SiteMap, where: Where) -> tuple[Choice, ...]:
    """Decide every site of a model.

    Args:
        site_map: The sites, see :func:`coordconv_patch.sites.find_sites`.
        where: One selector or a list of them (their union). A selector is:

            - ``"first"``: the first executed convolution;
            - ``"all"``: every convolution;
            - an exact qualified name, or a glob (``"layer1.*.conv1"``; ``*`` crosses dots);
            - ``"re:..."``: a regular expression that matches the whole name;
            - ``"stem"``, ``"neck"``, ``"head"``: see :data:`PRESETS`;
            - a module type, or a callable that takes a :class:`Site` and returns a bool.

    Returns:
        One choice per site, in the map's order. At least one is chosen.

    Raises:
        SelectionError: If a selector matches nothing, or only sites that cannot be
            patched, or if the order of execution is needed and unknown.
    """
    if not site_map.sites:
        raise SelectionError("the model has no convolution that coordinates could be added to")
    selectors = list(where) if isinstance(where, (list, tuple)) else [where]
    if not selectors:
        raise SelectionError("where=[] selects nothing; write 'first', 'all' or names of sites")
    reasons: dict[str, str] = {}
    for selector in selectors:
        matched = _match(site_map, selector)
        usable = [site for site in matched if not site.obstacle and not site.patched]
        insists = isinstance(selector, str) and (
            selector == "first" or any(selector in _names(site) for site in matched)
        )
        if not usable or (insists and len(usable) < len(matched)):
            raise SelectionError(_unusable(selector, matched))
        for site in usable:
            reasons.setdefault(site.name, f"matches {_show(selector)}")
    return tuple(_choice(site, reasons) for site in site_map.sites)


def _choice(site: Site, reasons: dict[str, str]) -> Choice:
    if site.name in reasons:
        return Choice(site, True, reasons[site.name])
    if site.patched:
        return Choice(site, False, "already patched")
    return Choice(site, False, site.obstacle or "not selected")


def _match(site_map: SiteMap, selector: object) -> list[Site]:
    """The sites that one selector describes; never empty."""
    sites = site_map.sites
    if isinstance(selector, type):
        found = [site for site in sites if isinstance(site.module, selector)]
        return found or _nothing(
            selector, f"its convolutions are of {listing({s.class_name for s in sites})}"
        )
    if callable(selector):
        return [site for site in sites if selector(site)] or _nothing(
            selector, f"it returned a false value for each of the {len(sites)} sites"
        )
    if not isinstance(selector, str):
        raise SelectionError(
            f"where={selector!r}: write 'first', 'all', a name, a glob, 're:...', a module type, "
            "a callable on a site, or a list of these"
        )
    if selector == "all":
        return list(sites)
    if selector == "first":
        return [_first(site_map)]
    if selector.startswith("re:"):
        return _match_regex(sites, selector)
    exact = [site for site in sites if selector in _names(site)]
    if exact:
        return exact
    if selector in PRESETS:
        return PRESETS[selector](site_map) or _nothing(
            selector, f"this model's sites are {listing(site.name for site in sites)}"
        )
    globbed = [
        site for site in sites if any(fnmatch.fnmatchcase(n, selector) for n in _names(site))
    ]
    return globbed or _nothing(selector, _close_names(sites, selector))


def _match_regex(sites: Sequence[Site], selector: str) -> list[Site]:
    try:
        pattern = re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise SelectionError(f"where={selector!r} is no regular expression: {error}") from error
    found = [site for site in sites if any(pattern.fullmatch(name) for name in _names(site))]
    return found or _nothing(
        selector,
        f"it must match the whole name; {_close_names(sites, selector.removeprefix('re:'))}",
    )


def _names(site: Site) -> tuple[str, ...]:
    return (site.name, *site.aliases)


def _first(site_map: SiteMap) -> Site:
    if not site_map.order_known:
        raise SelectionError(
            "cannot tell which convolution runs first: the model cannot be traced whole "
            f"({site_map.untraced}). Pass example_inputs=..., or name the site; the first "
            f"registered one is {site_map.sites[0].name!r}"
        )
    if site_map.sites[0].order is None:
        raise SelectionError("no convolution is executed in the forward pass")
    return site_map.sites[0]


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
    "stem": lambda site_map: [_first(site_map)],
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


def _nothing(selector: object, hint: str) -> list[Site]:
    raise SelectionError(f"where={_show(selector)} matches no convolution of this model; {hint}")


def _unusable(selector: object, matched: Sequence[Site]) -> str:
    if all(site.patched for site in matched):
        names = listing(site.name for site in matched)
        return (
            f"where={_show(selector)}: already patched: {names}. Choose other sites, or unpatch "
            "the model first"
        )
    lines = [
        f"  {site.name}: {'already patched' if site.patched else site.obstacle}"
        for site in matched
        if site.patched or site.obstacle
    ]
    return f"where={_show(selector)} cannot be patched:\n" + "\n".join(lines)


def _close_names(sites: Sequence[Site], text: str) -> str:
    names = [name for site in sites for name in _names(site)]
    plain = text.replace("*", "").replace("?", "").strip(".")
    close = difflib.get_close_matches(plain, [*names, *PRESETS, "first", "all"], n=3, cutoff=0.5)
    close += [name for name in names if plain and plain in name and name not in close]
    if close:
        return f"close names: {listing(close)}"
    return f"its sites are {listing(names)}"


def _show(selector: object) -> str:
    if isinstance(selector, str):
        return repr(selector)
    return getattr(selector, "__name__", repr(selector))
