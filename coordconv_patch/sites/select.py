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
from typing import Any, TypeAlias

from torch import nn

from coordconv_patch.arguments import given
from coordconv_patch.errors import SelectionError, listing
from coordconv_patch.layers.geometry import ConvGeometry
from coordconv_patch.sites.find import Site, SiteMap

__all__ = ["PRESETS", "Choice", "Where", "not_chosen", "select"]

Selector: TypeAlias = "str | type[nn.Module] | Callable[[Site], bool]"
Where: TypeAlias = "Selector | Sequence[Selector]"
"""What ``where=`` may be."""


@dataclass(frozen=True)
class Choice:
    """Whether a site was chosen, and why (not).

    Attributes:
        site: The site.
        chosen: Whether it was chosen.
        reason: Why, or why not.
        calls: Which of its calls were chosen, from 0; ``None``: every one.
        skipped: Whether a selector describes it, but it cannot be patched.
    """

    site: Site
    chosen: bool
    reason: str
    calls: tuple[int, ...] | None = None
    skipped: bool = False


def select(site_map: SiteMap, where: Where) -> tuple[Choice, ...]:
    """Decide every site of a model.

    Args:
        site_map: The sites, see :func:`coordconv_patch.sites.find.find_sites`.
        where: One selector or a list of them (their union). A selector is:

            - ``"first"``: the first executed convolution;
            - ``"all"``: every convolution;
            - an exact qualified name, or a glob (``"layer1.*.conv1"``; ``*`` crosses dots);
            - ``"re:..."``: a regular expression that matches the whole name;
            - ``"stem"``, ``"neck"``, ``"head"``: see :data:`PRESETS`;
            - a module type, or a callable that takes a :class:`Site` and returns a bool;
            - a name, glob or regular expression and ``@`` and numbers, ``"head.conv@0,3"``:
              of its calls, counted from 0 in order of execution, those alone. Needs sites
              found with example inputs.

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
    found: dict[str, Choice] = {}
    skipped: set[str] = set()
    for selector in selectors:
        plain, calls = _split_calls(site_map, selector)
        matched = _match(site_map, plain)
        usable = [site for site in matched if not site.obstacle and not site.patched]
        insists = isinstance(plain, str) and (
            plain == "first" or any(plain in _names(site) for site in matched)
        )
        if not usable or (insists and len(usable) < len(matched)):
            raise SelectionError(_unusable(selector, matched))
        skipped |= {site.name for site in matched if site.obstacle}
        for site in usable:
            if calls is not None:
                _check_calls(site, calls, selector)
            choice = Choice(site, True, f"matches {_show(selector)}", calls)
            found[site.name] = _union(found[site.name], choice) if site.name in found else choice
    return tuple(
        found.get(site.name) or not_chosen(site, skipped=site.name in skipped)
        for site in site_map.sites
    )


def _union(first: Choice, second: Choice) -> Choice:
    if first.calls is None or second.calls is None:
        return first if first.calls is None else second
    calls = tuple(sorted({*first.calls, *second.calls}))
    return Choice(first.site, True, f"{first.reason}, {second.reason}", calls)


def not_chosen(site: Site, *, skipped: bool = False) -> Choice:
    """The choice of a site that no selector chose, with the reason."""
    if site.patched:
        return Choice(site, False, "already patched")
    return Choice(site, False, site.obstacle or "not selected", skipped=skipped)


_CALLS = re.compile(r"(?P<sites>.+)@(?P<calls>\d+(?:\s*,\s*\d+)*)", re.DOTALL)


def _split_calls(site_map: SiteMap, selector: Any) -> tuple[Any, tuple[int, ...] | None]:
    """``"conv@0,3"`` as ``"conv"`` and (0, 3); other selectors as they are."""
    split = _CALLS.fullmatch(selector) if isinstance(selector, str) else None
    if split is None or any(selector in _names(site) for site in site_map.sites):
        return selector, None
    return split["sites"], tuple(sorted({int(number) for number in split["calls"].split(",")}))


def _default_output_size(geometry: ConvGeometry, input_size: tuple[int, ...]) -> tuple[int, ...]:
    """Output size of a transposed convolution that is asked for none."""
    padding = geometry.padding
    assert not isinstance(padding, str)
    return tuple(
        (length - 1) * stride - 2 * pad + dilation * (kernel - 1) + extra + 1
        for length, stride, pad, dilation, kernel, extra in zip(
            input_size,
            geometry.stride,
            padding,
            geometry.dilation,
            geometry.kernel_size,
            geometry.output_padding,
            strict=True,
        )
    )


def _check_calls(site: Site, calls: tuple[int, ...], selector: object) -> None:
    if site.calls is None:
        raise SelectionError(
            f"where={_show(selector)}: the calls of {site.name} are not known: pass "
            "example_inputs=..., on which they are counted"
        )
    beyond = [index for index in calls if index >= len(site.calls)]
    if beyond:
        sizes = [
            f"@{index} at " + "\u00d7".join(map(str, call.input_size))
            for index, call in enumerate(site.calls)
        ]
        raise SelectionError(
            f"where={_show(selector)}: {site.name} has no call {beyond[0]}; on the example inputs "
            f"it is called {len(site.calls)} times: {listing(sizes, 8)}"
        )
    if site.geometry is not None and site.geometry.transposed:
        for index in calls:
            if site.calls[index].output_size != _default_output_size(
                site.geometry, site.calls[index].input_size
            ):
                raise SelectionError(
                    f"where={_show(selector)}: call {index} of {site.name} asks for an output_size "
                    "of its own, which chosen calls do not follow: choose all calls"
                )
    if site.owned is not None:
        if not _is_in_one_run(site):
            raise SelectionError(
                f"where={_show(selector)}: the {len(site.calls)} calls of {site.name} happen in "
                f"several runs of {site.owned.owner or 'the model'}, which cannot be told apart: "
                "choose all calls"
            )
    elif site.kind == "function":
        if len(site.nodes) != len(site.calls):
            raise SelectionError(
                f"where={_show(selector)}: {site.name} is called at {len(site.nodes)} places of a "
                f"graph that runs several times ({len(site.calls)} calls in all), whose runs "
                "cannot be told apart: choose all calls"
            )
    elif site.caller is None:
        raise SelectionError(
            f"where={_show(selector)}: the calls of {site.name} cannot be counted, because only "
            "GraphModules call it, which lose their hooks when they are copied: choose all calls, "
            "or patch the model before it is traced"
        )


def _is_in_one_run(site: Site) -> bool:
    """Whether all calls of a functional site happen in one forward of the module that calls."""
    owner = site.owned.owner if site.owned is not None else ""
    caller = site.caller
    return caller is not None and (not owner or f"{caller}.".startswith(f"{owner}."))


def _match(site_map: SiteMap, selector: object) -> list[Site]:
    """The sites that one selector describes; never empty."""
    sites = site_map.sites
    if isinstance(selector, type):
        found = [site for site in sites if isinstance(site.module, selector)]
        return found or _nothing(
            selector, f"its convolutions are of {listing({s.class_name for s in sites})}"
        )
    if callable(selector) and not isinstance(selector, nn.Module):
        return [site for site in sites if _accepts(selector, site)] or _nothing(
            selector, f"it returned a false value for each of the {len(sites)} sites"
        )
    if not isinstance(selector, str):
        raise SelectionError(
            f"{given('where', selector)}: write 'first', 'all', a name, a glob, 're:...', a module "
            "type, a callable on a site, or a list of these"
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


def _accepts(selector: Callable[[Site], Any], site: Site) -> bool:
    try:
        return bool(selector(site))
    except Exception as error:
        raise SelectionError(
            f"where={_show(selector)} failed on the site {site.name!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


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
    if all(site.obstacle for site in site_map.sites):
        raise SelectionError(_unusable("first", site_map.sites))
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
        f"  {site.name or 'the model'}: {'already patched' if site.patched else site.obstacle}"
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
