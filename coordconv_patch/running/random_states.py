"""Random states: what a look or a trial draws must not change what the user's program draws."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["random_states_kept", "seed_all"]


@contextmanager
def random_states_kept(devices: Sequence[int] | None = None) -> Iterator[None]:
    """Put back the random states of Python, of NumPy and of torch.

    Args:
        devices: The CUDA devices whose states are put back too; ``None``: all, if CUDA is in use.
    """
    python, numpy = random.getstate(), np.random.get_state()
    if devices is None:
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = range(torch.cuda.device_count()) if in_use else ()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_all(seed: int) -> None:
    """Seed all of them, so that two runs draw alike."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
