"""Fixtures of the training tools' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes for functions that need a process group."""
    made = Ranks()
    yield made
    made.stop()
