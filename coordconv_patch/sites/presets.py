"""Choices of sites that have a name in ``where=``: the first, the stem, those of detectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordconv_patch.arguments import check_callable, check_word
from coordconv_patch.errors import ArgumentError, SelectionError, listing
from coordconv_patch.sites.detector_parts import Part, branches, mask_features, necks
from coordconv_patch.sites.other_ways import may_run_before
from coordconv_patch.sites.site import Site, SiteMap

__all__ = ["PRESETS", "Placement", "first_site", "register_selector", "unusable"]


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
    if first.calls is None and (others := may_run_before(first, site_map)):
        raise SelectionError(
            f"cannot tell which convolution runs first: a trace calls {first.name!r} first, and "
            f"never calls {listing(others)}. A trace may take another way through the code than a "
            "forward pass, where the code asks what kind of tensor it was given. Pass "
            "example_inputs=..., or name the site"
        )
    return [first]


_MOST_LINES = 5
"""Sites that one message explains."""


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
    more = f"\n  ... ({len(lines)} in all)" if len(lines) > _MOST_LINES else ""
    return f"where={selector} cannot be patched:\n" + "\n".join(lines[:_MOST_LINES]) + more


class Placement(list[Site]):
    """Sites that a selector means, and what each of them is.

    Attributes:
        why: What a site is, by its name.
    """

    def __init__(self, why: Sequence[tuple[Site, str]]) -> None:
        super().__init__({site.name: site for site, _ in why}.values())
        self.why = {site.name: text for site, text in reversed(why)}


def _stem(site_map: SiteMap) -> list[Site]:
    """The convolution that runs first.

    Where Liu et al. 2018 (https://arxiv.org/abs/1807.03247) put coordinates into ResNet-50 for
    ImageNet, into Faster R-CNN, and into the policy for Atari, though there beside others.
    """
    return Placement([(site, "the first convolution that runs") for site in first_site(site_map)])


def _neck(site_map: SiteMap) -> list[Site]:
    """Every 1x1 convolution of the neck, see :mod:`.detector_parts`: a half of ``"ppyolo"``."""
    parts = necks(site_map.model, [site.name for site in site_map.sites])
    return Placement(
        [
            (site, f"a 1x1 of {part.what}")
            for site in site_map.sites
            if set(site.kernel_size) == {1}
            for part in parts
            if part.holds(site.name)
        ]
    )


def _head(site_map: SiteMap) -> list[Site]:
    """The first convolution of each branch of each head: the other half of ``"ppyolo"``."""
    return _firsts(site_map, branches(site_map.model, [site.name for site in site_map.sites]))


def _ppyolo(site_map: SiteMap) -> list[Site]:
    """The 1x1 convolutions of the neck, and the first convolution of each branch of the head.

    Long et al. 2020, "PP-YOLO" (https://arxiv.org/abs/2007.12099), section 3.2, CoordConv.
    """
    return _both(_neck(site_map), _head(site_map))


def _solo(site_map: SiteMap) -> list[Site]:
    """The first convolution of each branch of a head that says where things are, not what.

    Wang et al. 2019, "SOLO" (https://arxiv.org/abs/1912.04488): the mask branch sees coordinates
    at its beginning, the category branch sees none. In SOLOv2 (https://arxiv.org/abs/2003.10152)
    it is the mask kernel branch. Detectors with boxes have branches for boxes in its place, and
    those of mask coefficients, which are kernels, beside them.
    """
    parts = branches(site_map.model, [site.name for site in site_map.sites])
    return _firsts(site_map, [part for part in parts if part.says_where])


def _solov2(site_map: SiteMap) -> list[Site]:
    """``"solo"``, and the first convolution of the mask features.

    SOLOv2 (https://arxiv.org/abs/2003.10152) has coordinates in the mask kernel branch and, second,
    in the mask feature branch, there at the coarsest level of the pyramid. What is found here as
    mask features is ultralytics' ``Proto``, whose only level is that of its input.
    """
    return _both(_solo(site_map), _firsts(site_map, mask_features(site_map.model)))


def _firsts(site_map: SiteMap, parts: Sequence[Part]) -> Placement:
    """The first site of each part."""
    firsts = []
    for part in parts:
        held = [site for site in site_map.sites if part.holds(site.name)]
        firsts += [(site, f"the first of {part.what}") for site in held[:1]]
    return Placement(firsts)


def _both(first: list[Site], second: list[Site]) -> Placement:
    """Two placements as one."""
    named = [*first, *second]
    texts = {**getattr(second, "why", {}), **getattr(first, "why", {})}
    return Placement([(site, texts[site.name]) for site in named])


PRESETS: dict[str, Callable[[SiteMap], list[Site]]] = {
    "stem": _stem,
    "neck": _neck,
    "head": _head,
    "ppyolo": _ppyolo,
    "solo": _solo,
    "solov2": _solov2,
}
"""Named choices that the literature backs; their docstrings name the sources.

- ``"stem"``: the first executed convolution (the paper's ImageNet and reinforcement learning);
- ``"neck"``: the 1x1 convolutions of the neck;
- ``"head"``: the first convolution of each branch of each detection or segmentation head;
- ``"ppyolo"``: these two;
- ``"solo"``: as ``"head"``, without the branches that predict classes alone;
- ``"solov2"``: that, and the first convolution of the mask features.
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
