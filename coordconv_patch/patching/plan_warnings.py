"""Warnings about a plan: convolutions without coordinates, never run, or of regions of interest."""

from __future__ import annotations

import warnings

from torch import nn

from coordconv_patch.errors import listing
from coordconv_patch.patching.plan import Plan
from coordconv_patch.patching.plan_notes import roi_notes
from coordconv_patch.patching.same_outputs import Promise
from coordconv_patch.sites.other_ways import unread_weights

__all__ = [
    "warn_of_obstacles",
    "warn_of_regions_of_interest",
    "warn_of_unreached",
    "warn_of_unread",
]


def warn_of_obstacles(decided: Plan) -> None:
    """Warn of convolutions that a selector describes and that cannot carry coordinates."""
    skipped = [row.site for row in decided.rows if row.choice.skipped]
    if skipped:
        shown = "; ".join(f"{site.name or 'the model'}: {site.obstacle}" for site in skipped[:3])
        more = f"; and {len(skipped) - 3} more, see plan(...)" if len(skipped) > 3 else ""
        warnings.warn(
            f"convolutions without coordinates, because they cannot carry them: {shown}{more}",
            stacklevel=3,
        )


def warn_of_regions_of_interest(decided: Plan, model: nn.Module) -> None:
    """Warn of chosen convolutions whose coordinates are those of a box, not of the picture.

    Those that were named are left out: where they lie was known.
    """
    chosen = [row.site for row in decided.rows if row.chosen and not row.choice.named]
    names = [site.name for site in chosen if site.roi_operator]
    if names:
        warnings.warn(
            f"chosen convolutions see regions of interest, and their coordinates are those of a "
            f"box, not of the picture: {listing(names)}. Name them in where=... if that is meant; "
            "where=lambda site: not site.roi_operator leaves such out",
            stacklevel=3,
        )
    for note in roi_notes(decided.site_map, model) if chosen else ():
        warnings.warn(note, stacklevel=3)


def warn_of_unread(decided: Plan) -> None:
    """Warn where a trace may have missed the functional convolutions that really run.

    Convolution modules are found where they are not traced; functional ones are not.
    """
    traced = [site for site in decided.chosen if site.calls is None]
    unread = {name for site in traced for name in unread_weights(site, decided.site_map)}
    if unread:
        warnings.warn(
            f"a trace never reads {listing(sorted(unread))}. If the model convolves by these, the "
            "trace has taken another way through its code, and these convolutions have no "
            "coordinates: pass example_inputs=...",
            stacklevel=3,
        )


def warn_of_unreached(decided: Plan, promise: Promise | None) -> None:
    """Warn of coordinates that the example inputs never reach, or in one mode only."""
    if promise is not None:
        reached = promise.reached
    else:
        known = [row.site for row in decided.rows if row.site.calls is not None]
        if not known:
            return
        reached = {"evaluation": frozenset(site.name for site in known if site.calls)}
    names = [site.name for site in decided.chosen]
    everywhere = {name for name in names if all(name in run for run in reached.values())}
    nowhere = [name for name in names if not any(name in run for run in reached.values())]
    texts = []
    if nowhere:
        texts.append(f"never run on the example inputs: {listing(nowhere)}")
    for mode, run in reached.items():
        only = [name for name in names if name in run and name not in everywhere]
        if only:
            other = "evaluation" if mode == "training" else "training"
            texts.append(
                f"run in {mode} only, so that {other} knows nothing of their coordinates: "
                f"{listing(only)}"
            )
    if texts:
        warnings.warn(f"chosen convolutions {'; '.join(texts)}", stacklevel=4)
