"""Stages of a network: its sites in groups, by the names of the modules that they lie in."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MOST_STAGES", "stages_of"]

MOST_STAGES = 16
"""No stage is split where that would give more than so many."""


def stages_of(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Sites by stage: ``conv1``, ``layer1``, ...; in the order of the names.

    A group begins as all sites, and is split by the next part of their names while it holds more
    than half of them: ``blocks`` of an EfficientNet is, ``layer3`` of a ResNet-50 is not. What is
    left of a name beyond its stage does not matter, so a stage may be one convolution.

    Args:
        names: Qualified names of the sites, in order of execution.
    """
    groups = {"": tuple(names)}
    refused: set[str] = set()
    while True:
        large = [
            name
            for name, sites in groups.items()
            if name not in refused and len(sites) > 1 and len(sites) > len(names) / 2
        ]
        if not large:
            return groups
        (stage,) = large
        parts = _split(stage, groups[stage])
        if len(groups) - 1 + len(parts) > MOST_STAGES:
            refused.add(stage)
            continue
        split: dict[str, tuple[str, ...]] = {}
        for name, sites in groups.items():
            split |= parts if name == stage else {name: sites}
        groups = split


def _split(stage: str, sites: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sites of a stage by one more part of their names."""
    depth = stage.count(".") + 1 if stage else 0
    parts: dict[str, tuple[str, ...]] = {}
    for site in sites:
        name = ".".join(site.split(".")[: depth + 1])
        parts[name] = (*parts.get(name, ()), site)
    return parts
