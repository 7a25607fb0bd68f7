"""What pages may add to, and is put back after each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from coordconv_patch.channels.registry import BLOCKS
from coordconv_patch.export.rewrites import REWRITES
from coordconv_patch.folding.method_names import _FOLDING_METHODS
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.sites.presets import PRESETS

# Read when ultralytics is imported: no downloads, no installation of packages on the fly.
os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")


@pytest.fixture
def registries() -> Iterator[None]:
    """Every registry is as it was afterwards."""
    all_of_them: list[dict[str, Any]] = [LOWERINGS, REWRITES, PRESETS, BLOCKS, _FOLDING_METHODS]
    before = [dict(registry) for registry in all_of_them]
    yield
    for registry, entries in zip(all_of_them, before, strict=True):
        registry.clear()
        registry.update(entries)
