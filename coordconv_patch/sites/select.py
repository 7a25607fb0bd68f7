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
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import nn

from coordconv_patch.arguments import given
from coordconv_patch.errors import CoordConvPatchError, SelectionError, excerpt, first_line, listing
from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.sites.chosen_calls import choose_calls, split_indices
from coordconv_patch.sites.presets import PRESETS, Placement, first_site, unusable
from coordconv_patch.sites.site import ModuleSite, Site, SiteMap

__all__ = ["Choice", "Where", "not_chosen", "select"]

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
        chosen_calls: Which of its calls were chosen; ``None``: every one.
        skipped: Whether a selector describes it, but it cannot be patched.
        named: Whether it was chosen by its name: exact, by a glob or by a regular expression.
    """

    site: Site
    chosen: bool
    reason: str
    chosen_calls: ChosenCalls | None = None
    skipped: bool = False
    named: bool = False


def select(site_map: SiteMap, where: Where) -> tuple[Choice, ...]:
    """Decide every site of a model.

    Args:
        site_map: The sites, see :func:`coordconv_patch.sites.find.find_sites`.
        where: One selector or a list of them (their union). A selector is:

            - ``"first"``: the first executed convolution;
            - ``"all"``: every convolution;
            - an exact qualified name, or a glob (``"layer1.*.conv1"``; ``*`` crosses dots);
            - the name of another module (``"layer1"``): every convolution in it;
            - ``"re:..."``: a regular expression that matches the whole name;
            - ``"stem"``, ``"neck"``, ``"head"``, ``"ppyolo"``, ``"solo"``, ``"solov2"``: placements
              of the literature, see :data:`coordconv_patch.sites.presets.PRESETS`;
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
    choices: dict[str, Choice] = {}
    skipped: set[str] = set()
    for selector in selectors:
        plain, indices = _split_indices(site_map, selector)
        matched = _match(site_map, plain)
        usable = [site for site in matched if not site.obstacle and not site.patched]
        insists = isinstance(plain, str) and (
            plain == "first" or any(plain in site.names for site in matched)
        )
        if not usable or (insists and len(usable) < len(matched)):
            raise SelectionError(unusable(_show(selector), matched))
        skipped |= {site.name for site in matched if site.obstacle}
        for site in usable:
            calls = None if indices is None else choose_calls(site, indices, _show(selector))
            named = _names_sites(plain, matched)
            choice = Choice(site, True, _reason(selector, matched, site), calls, named=named)
            choices[site.name] = _union(choices.get(site.name), choice)
    return tuple(
        choices.get(site.name) or not_chosen(site, skipped=site.name in skipped)
        for site in site_map.sites
    )


def _reason(selector: object, matched: Sequence[Site], site: Site) -> str:
    """Why a site was chosen, and what it is where the selector tells that."""
    why = matched.why.get(site.name, "") if isinstance(matched, Placement) else ""
    return f"matches {_show(selector)}: {why}" if why else f"matches {_show(selector)}"


def _split_indices(site_map: SiteMap, selector: Any) -> tuple[Any, tuple[int, ...] | None]:
    """A selector, and which calls it chooses; a name of a site that ends in ``@0`` is a name."""
    if not isinstance(selector, str) or any(selector in site.names for site in site_map.sites):
        return selector, None
    return split_indices(selector)


def _names_sites(selector: object, matched: Sequence[Site]) -> bool:
    """Whether a selector tells names of sites, not what they are or where they lie."""
    if not isinstance(selector, str):
        return False
    words = ("first", "all", *PRESETS)
    return selector not in words or any(selector in site.names for site in matched)


def _union(first: Choice | None, second: Choice) -> Choice:
    """What two selectors choose of one site."""
    if first is None:
        return second
    named = first.named or second.named
    if first.chosen_calls is None:
        return replace(first, named=named)
    if second.chosen_calls is None:
        return replace(second, named=named)
    indices = {*first.chosen_calls.indices, *second.chosen_calls.indices}
    calls = replace(first.chosen_calls, indices=tuple(sorted(indices)))
    return Choice(first.site, True, f"{first.reason}, {second.reason}", calls, named=named)


def not_chosen(site: Site, *, skipped: bool = False) -> Choice:
    """The choice of a site that no selector chose, with the reason."""
    if site.patched:
        return Choice(site, False, "already patched")
    return Choice(site, False, site.obstacle or "not selected", skipped=skipped)


def _match(site_map: SiteMap, selector: object) -> list[Site]:
    """The sites that one selector describes; never empty."""
    sites = site_map.sites
    if isinstance(selector, type):
        of_type: list[Site] = [
            site
            for site in sites
            if isinstance(site, ModuleSite) and isinstance(site.module, selector)
        ]
        return of_type or _nothing(
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
        return first_site(site_map)
    if selector.startswith("re:"):
        return _match_regex(sites, selector)
    exact = [site for site in sites if selector in site.names]
    if exact:
        return exact
    if selector in PRESETS and (meant := _meant_by(selector, site_map)):
        return meant
    inside = [site for site in sites if any(n.startswith(f"{selector}.") for n in site.names)]
    if inside and selector:
        return Placement([(site, f"in the module {selector}") for site in inside])
    if selector in PRESETS:
        return _nothing(selector, f"this model's sites are {listing(s.name for s in sites)}")
    globbed = [site for site in sites if any(fnmatch.fnmatchcase(n, selector) for n in site.names)]
    return globbed or _nothing(selector, _several(selector) or _what_it_is(site_map, selector))


def _meant_by(name: str, site_map: SiteMap) -> list[Site]:
    """The sites that a named selector means.

    Raises:
        SelectionError: If it is a registered one that fails, or gives something else.
    """
    try:
        meant = PRESETS[name](site_map)
    except CoordConvPatchError:
        raise
    except Exception as error:
        raise SelectionError(f"where={name!r} failed: {first_line(error)}") from error
    known = {id(site) for site in site_map.sites}
    meant = list(meant) if isinstance(meant, tuple) else meant
    if not isinstance(meant, list) or any(id(site) not in known for site in meant):
        raise SelectionError(
            f"where={name!r} gave {excerpt(meant)}: a registered selector is to give a list of the "
            "sites that it gets, none of its own"
        )
    return meant


def _several(selector: str) -> str:
    """A hint where a string holds several selectors; empty if it holds one."""
    parts = [part.strip() for part in selector.split(",") if part.strip()]
    return f"for several selectors write where={excerpt(parts)}" if len(parts) > 1 else ""


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
        raise SelectionError(
            f"where={_show(selector)} is not a regular expression: {error}"
        ) from error
    matched = [site for site in sites if any(map(pattern.fullmatch, site.names))]
    return matched or _nothing(
        selector,
        f"it must match the whole name; {_close_names(sites, selector.removeprefix('re:'))}",
    )


def _nothing(selector: object, hint: str) -> list[Site]:
    raise SelectionError(f"where={_show(selector)} matches no convolution of this model; {hint}")


def _what_it_is(site_map: SiteMap, name: str) -> str:
    """What a name that matches nothing is: a module without convolutions, or a misspelling."""
    modules = {} if site_map.model is None else dict(site_map.model.named_modules())
    if name and name in modules:
        return f"it is a {type(modules[name]).__name__}, in which there is none"
    return _close_names(site_map.sites, name)


def _close_names(sites: Sequence[Site], text: str) -> str:
    names = [name for site in sites for name in site.names]
    plain = text.replace("*", "").replace("?", "").strip(".")
    close = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
    words = [*PRESETS, "first", "all"]
    close += difflib.get_close_matches(plain, words, n=1, cutoff=0.7)
    close += [name for name in names if plain and plain in name and name not in close]
    if close:
        return f"close names: {listing(close)}"
    return f"its sites are {listing(names)}"


def _show(selector: object) -> str:
    """A selector for a message."""
    name = None if isinstance(selector, str) else getattr(selector, "__name__", None)
    return name if isinstance(name, str) else excerpt(selector)
