"""Every entry of the sweep, by name."""

from __future__ import annotations

from zoo import catalogue_others, catalogue_timm, catalogue_torchvision, catalogue_transformers
from zoo.entry import Entry

__all__ = ["CATALOGUE"]

_ALL = [
    *catalogue_timm.ENTRIES,
    *catalogue_torchvision.ENTRIES,
    *catalogue_transformers.ENTRIES,
    *catalogue_others.ENTRIES,
]

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ALL}

assert len(CATALOGUE) == len(_ALL), "two entries have one name"
