"""What a convolution call is part of, as the frames above it tell.

A torch function mode sees a function and its arguments, not who calls it. Only eager code has
frames to ask: nothing here may be called while torch.compile traces.
"""

from __future__ import annotations

import functools
import inspect
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

__all__ = ["is_for_its_own_weight", "is_in_another_graph", "runs_again", "stores_weight"]

_CONV_CODES = frozenset(
    {
        *(getattr(nn, f"Conv{ndim}d")._conv_forward.__code__ for ndim in (1, 2, 3)),
        *(getattr(nn, f"ConvTranspose{ndim}d").forward.__code__ for ndim in (1, 2, 3)),
    }
)
"""The code that calls a convolution function in torch's own modules."""
_CHECKPOINTS = frozenset({checkpoint.__code__, CheckpointFunction.forward.__code__})
_THIS_PACKAGE = f"{__name__.partition('.')[0]}."


def is_in_another_graph(frame: FrameType, owner: nn.Module) -> bool:
    """Whether a call is made by a graph that is not part of a module.

    Where a part of an eager forward is compiled and its backend runs the graph in Python, as
    ``backend="eager"`` does, the calls of that graph are seen again, by the mode
    under which the graph was traced with everything that the mode added.

    Args:
        frame: The calling frame.
        owner: The module.
    """
    if frame.f_code is fx.Interpreter.call_function.__code__:
        graph = frame.f_locals["self"].module
    elif frame.f_code.co_filename.startswith("<eval_with_key>"):
        graph = frame.f_locals.get("self")
    else:
        return False
    return not any(graph is module for module in owner.modules())


def is_for_its_own_weight(frame: FrameType, weight: Any) -> bool:
    """Whether a convolution module calls with the weight that it stores, or a branch with its own.

    Under ``torch.func.functional_call``, and in the replicas of DataParallel, stored weights
    are no Parameters; and a coordinate weight may be parametrized.
    """
    if str(frame.f_globals.get("__name__", "")).startswith(_THIS_PACKAGE):
        return True
    if frame.f_code not in _CONV_CODES:
        return False
    return stores_weight(frame.f_locals["self"], weight)


def stores_weight(module: nn.Module, weight: Any) -> bool:
    """Whether a weight is a module's own ``weight``, if only as an attribute, as where pruned."""
    attributes = vars(module)
    stored = attributes["_parameters"].get("weight"), attributes.get("weight")
    return any(weight is each for each in stored)


def runs_again(code: CodeType) -> str:
    """How what runs inside of a function is run again by itself, to compute gradients.

    It is in gradient checkpointing. The backward of an autograd Function, which guided-diffusion's
    checkpoint is, knows nothing of what was added to its forward.

    Returns:
        In words; empty for any other code.
    """
    if code in _CHECKPOINTS:
        return "gradient checkpointing of a function"
    if not torch.is_grad_enabled() and _is_of_autograd_function(code):
        return "an autograd Function (its own gradient checkpointing, perhaps)"
    return ""


@functools.lru_cache(maxsize=4096)
def _is_of_autograd_function(code: CodeType) -> bool:
    """Whether code is the forward of a subclass of :class:`torch.autograd.Function`."""
    classes: list[type] = [torch.autograd.Function]
    while classes:
        one = classes.pop()
        classes += one.__subclasses__()
        forward: Any = inspect.unwrap(one.forward)  # type: ignore[attr-defined]  # of custom_fwd
        if getattr(forward, "__code__", None) is code:
            return True
    return False
