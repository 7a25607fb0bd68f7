"""Whether torch is looking on: capturing a graph, or computing with tensors that are not real."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_capturing", "is_transforming"]


def is_capturing() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is looking on, in this thread."""
    # The first flag is one for the whole process; whether this thread captures, the others tell.
    return (
        torch.compiler.is_compiling()
        and (torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0)
    ) or torch._C._is_tracing()


def is_transforming() -> bool:
    """Whether what is computed now must not be kept, nor be left out because it was kept.

    Under dispatch modes and torch.func transforms tensors may be fake or wrapped. A function
    mode of somebody else (NNCF's) may be drawing a graph, which every later call must match.
    """
    return (
        is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or (torch._C._len_torch_function_stack() > 0 and _is_watched())
    )


def _is_watched() -> bool:
    """Whether a torch function mode is active that neither torch itself nor this package sets."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(
        type(mode).__module__.partition(".")[0] not in ("torch", "coordconv_patch")
        for mode in modes
    )
