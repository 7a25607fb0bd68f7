"""Single calls of a convolution in ``where=``: ``"head.conv@0,3"``."""

from __future__ import annotations

import re

from coordconv_patch.errors import SelectionError, listing
from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.layers.geometry import output_padding_between
from coordconv_patch.sites.site import Site

__all__ = ["choose_calls", "split_indices"]

_INDICES = re.compile(r"(?P<sites>.+)@(?P<indices>\d+(?:\s*,\s*\d+)*)", re.DOTALL)


def split_indices(selector: str) -> tuple[str, tuple[int, ...] | None]:
    """``"conv@3,0"`` as ``"conv"`` and (0, 3); a selector without such an end as it is."""
    split = _INDICES.fullmatch(selector)
    if split is None:
        return selector, None
    return split["sites"], tuple(sorted({int(number) for number in split["indices"].split(",")}))


def choose_calls(site: Site, indices: tuple[int, ...], selector: str) -> ChosenCalls:
    """Some of a site's calls, by indices from 0 in order of execution.

    ``selector`` is what chooses them, as messages show it.

    Raises:
        SelectionError: If the site has no such calls, or coordinates cannot be added to them
            alone.
    """
    if site.calls is None:
        raise SelectionError(
            f"where={selector}: the calls of {site.name} are not known: pass "
            "example_inputs=..., on which they are counted"
        )
    beyond = [index for index in indices if index >= len(site.calls)]
    if beyond:
        sizes = [
            f"@{index} at " + "\u00d7".join(map(str, call.input_size))
            for index, call in enumerate(site.calls)
        ]
        raise SelectionError(
            f"where={selector}: {site.name} has no call {beyond[0]}; on the example inputs "
            f"it is called {len(site.calls)} times: {listing(sizes, 8)}"
        )
    if site.geometry is not None and site.geometry.transposed:
        for index in indices:
            call, geometry = site.calls[index], site.geometry
            padding = output_padding_between(geometry, call.input_size, call.output_size)
            if padding != geometry.output_padding:
                raise SelectionError(
                    f"where={selector}: call {index} of {site.name} asks for an output_size "
                    "of its own, which chosen calls do not follow: choose all calls"
                )
    if site.calls_obstacle:
        raise SelectionError(f"where={selector}: {site.calls_obstacle}")
    return ChosenCalls(indices, len(site.calls), site.caller or "")
