"""Run what torch.compile has compiled as plain Python: its compiler would trace who looks on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from coordconv_patch.running.torch_versions import set_dynamo_callback
from coordconv_patch.running.untouched import LOOK

__all__ = ["uncompiled"]


@contextmanager
def uncompiled() -> Iterator[None]:
    """While entered, nothing is compiled, and compiled models, parts and functions run as written.

    Hooks and torch function modes see such a run as any other; the compiler would trace them. The
    setting is torch's, one for all threads: what others have compiled runs uncompiled meanwhile,
    with the same results.
    """
    # Before it is loaded, nothing can have been compiled; to load it takes as long as torch itself.
    if "torch._dynamo.eval_frame" not in sys.modules:
        yield
        return
    with LOOK:  # two threads would each put back what the other had set
        compiling = set_dynamo_callback(None)  # set_stance refuses to be called while it is set
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            set_dynamo_callback(compiling)
