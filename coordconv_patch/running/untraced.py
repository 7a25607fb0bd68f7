"""Compute without anybody noticing: neither autograd, nor a tracer, nor a dispatch mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes, _pop_mode, _push_mode

__all__ = ["untraced"]


@contextmanager
def untraced() -> Iterator[None]:
    """While entered, this thread computes without gradients, tracers and dispatch modes."""
    tracing: Any = torch._C
    state = tracing._get_tracing_state()
    tracing._set_tracing_state(None)
    try:
        with torch.no_grad(), _modes_disabled():
            yield
    finally:
        tracing._set_tracing_state(state)


@contextmanager
def _modes_disabled() -> Iterator[None]:
    """Put this thread's dispatch modes aside, and leave those of others alone.

    torch keeps the modes of torch.export's first phase once for the whole process, so disabling
    them takes them from whichever thread exports. Whether that is this one, a dispatch key says.
    """
    own: Any = torch._C
    if own._dispatch_tls_is_dispatch_key_included(own.DispatchKey.PreDispatch):
        with _disable_current_modes():
            yield
        return
    modes = [_pop_mode() for _ in range(own._len_torch_dispatch_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)
