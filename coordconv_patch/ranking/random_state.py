"""Random states, kept: what a ranking draws must not change what the user's program draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["random_states_kept", "seed_all"]


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put back the random states of torch, on every device, of NumPy and of Python."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_all(seed: int) -> None:
    """Seed all of them, so that two runs draw alike."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
