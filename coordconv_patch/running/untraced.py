"""Compute without anybody noticing: neither autograd, nor a tracer, nor a dispatch mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["untraced"]


@contextmanager
def untraced() -> Iterator[None]:
    """While entered, this thread computes without gradients, tracers and dispatch modes."""
    tracing: Any = torch._C
    state = tracing._get_tracing_state()
    tracing._set_tracing_state(None)
    try:
        with torch.no_grad(), _disable_current_modes():
            yield
    finally:
        tracing._set_tracing_state(state)
