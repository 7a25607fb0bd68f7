"""Find the fastest lowering of each group of sites by timing the whole model.

A convolution timed alone says little: what a runtime fuses depends on its neighbours. So
the model is exported with one group of sites lowered otherwise, and runs in turn with the
fastest so far; the change is kept if it is faster beyond doubt. Groups are taken one after
the other, those with the most work first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coordconv_patch.display.progress import progress_over
from coordconv_patch.errors import ExportError
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.lowering.site import LoweringSite
from coordconv_patch.runtime.timing import Ratio, alternate, median, ratio_of_medians

__all__ = ["Trial", "Tuning", "autotune", "group_of"]

_SECONDS = 1.5
"""Time that each of the two graphs of a trial gets."""

_FEWEST, _MOST = 15, 200
"""Runs of each of the two graphs of a trial."""

_FEW_CHANNELS = 4
"""A convolution with no more input channels reads an image."""


@dataclass(frozen=True)
class Trial:
    """One lowering of one group of sites, timed against the fastest graph before it.

    Attributes:
        group: Which sites, such as ``"3x3 depthwise"``.
        sites: How many.
        lowering: The form they were given.
        seconds: Median time of the whole model.
        ratio: Its ratio to the fastest graph before, with its interval; ``None`` where the
            graph could not be made or run.
        kept: Whether the lowering was kept.
        obstacle: Why the graph could not be made or run.
    """

    group: str
    sites: int
    lowering: str
    seconds: float = float("nan")
    ratio: Ratio | None = None
    kept: bool = False
    obstacle: str = ""


@dataclass(frozen=True)
class Tuning:
    """The fastest form of each site, by name, and what was tried, in order."""

    lowerings: dict[str, str]
    trials: tuple[Trial, ...]


def autotune(
    sites: Sequence[LoweringSite],
    initial: Callable[[LoweringSite], str],
    make_run: Callable[[Mapping[str, str]], Callable[[], Any]],
) -> Tuning:
    """Time the candidates of each group of sites and keep the fastest.

    Args:
        sites: The coordinate layers that the model calls.
        initial: The lowerings to begin with.
        make_run: Exports the model with these lowerings, by site name, and returns what
            runs it once on the execution provider.
    """
    lowerings = {site.name: initial(site) for site in sites}
    best = make_run(lowerings)
    groups = _groups(sites)
    plan = [
        (group, candidate)
        for group, members in groups.items()
        for candidate in _candidates(members)
    ]
    trials = []
    for group, candidate in progress_over(plan, "autotuning", unit="graphs", stays=True):
        members = groups[group]
        if all(lowerings[site.name] == candidate for site in members):
            continue
        changed = lowerings | {site.name: candidate for site in members}
        try:
            run = make_run(changed)
        except ExportError as error:
            reason = str(error).partition("\n")[0]
            trials.append(Trial(group, len(members), candidate, obstacle=reason))
            continue
        ratio, seconds = _compare(run, best)
        kept = ratio.high < 1
        trials.append(Trial(group, len(members), candidate, seconds, ratio, kept))
        if kept:
            lowerings, best = changed, run
    return Tuning(lowerings, tuple(trials))


def _compare(run: Callable[[], Any], best: Callable[[], Any]) -> tuple[Ratio, float]:
    """The ratio of the first to the second, and the median seconds of the first."""
    probe = alternate({"best": best}, repeats=3, warm_up=1)
    repeats = round(_SECONDS / max(median(probe["best"]), 1e-6))
    times = alternate(
        {"best": best, "changed": run}, repeats=min(max(repeats, _FEWEST), _MOST), warm_up=2
    )
    return ratio_of_medians(times["changed"], times["best"]), median(times["changed"])


def _groups(sites: Sequence[LoweringSite]) -> dict[str, list[LoweringSite]]:
    """The sites by group, the group with the most multiplications first."""
    groups: dict[str, list[LoweringSite]] = {}
    for site in sites:
        if not site.is_zero:
            groups.setdefault(group_of(site), []).append(site)
    by_work = sorted(groups.items(), key=lambda item: -sum(map(_work, item[1])))
    return dict(by_work)


def _work(site: LoweringSite) -> int:
    pixels = sum(torch.Size(call.output_size).numel() for call in site.calls)
    return pixels * site.geometry.out_channels * site.num_taps


def group_of(site: LoweringSite) -> str:
    """What sites are lowered alike: kernel, stride, kind; such as ``"3x3 depthwise stride 2"``."""
    geometry = site.geometry
    words = ["x".join(map(str, geometry.kernel_size))]
    if geometry.transposed:
        words.append("transposed")
    if geometry.groups > 1:
        words.append("depthwise" if geometry.groups == geometry.in_channels else "grouped")
    elif geometry.in_channels <= _FEW_CHANNELS:
        words.append("on the image")
    if max(geometry.stride) > 1:
        words.append(f"stride {'x'.join(map(str, dict.fromkeys(geometry.stride)))}")
    return " ".join(words)


def _candidates(sites: Sequence[LoweringSite]) -> list[str]:
    return [
        name
        for name, lowering in LOWERINGS.items()
        if lowering.fixes_size and not any(lowering.obstacle(site) for site in sites)
    ]
