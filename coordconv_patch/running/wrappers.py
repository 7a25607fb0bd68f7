"""What wraps a model: for several processes or devices, compiled, averaged."""

from __future__ import annotations

import sys

from torch import nn
from torch.optim.swa_utils import AveragedModel

from coordconv_patch.errors import PatchError

__all__ = ["check_not_wrapped", "clean_name", "is_compiled", "unwrapped"]

_WRAPPER_NAMES = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""Name components that wrappers put into qualified names, wherever they stand."""
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
"""They hold the model as ``module``."""
_WRAPPERS_ELSEWHERE = frozenset(
    {"timm.utils.model_ema.ModelEmaV2", "timm.utils.model_ema.ModelEmaV3"}
)
"""So do these, of libraries that this package does not import."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The bare model inside DistributedDataParallel, DataParallel, torch.compile or an EMA."""
    while True:
        if is_compiled(model):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, _WRAPPERS) or _qualified_class(model) in _WRAPPERS_ELSEWHERE:
            model = model.get_submodule("module")
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether this is what torch.compile gives for a module."""
    # torch.compile has loaded its compiler then; to import it takes as long as torch itself.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(model, compiler.OptimizedModule)


def _qualified_class(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def clean_name(name: str) -> str:
    """A qualified name without the components that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def check_not_wrapped(model: nn.Module) -> None:
    """Check that no wrapper around or in a model has made a list of its parameters already.

    Raises:
        PatchError: If one has: it would not synchronise the coordinate weights between
            processes, which then drift apart without a word.
    """
    wrappers = _parallel_wrappers()
    for name, module in model.named_modules():
        if isinstance(module, wrappers):
            raise PatchError(
                f"{name or 'the model'} is wrapped for several processes or devices (as "
                f"{type(module).__name__}), and what wraps it knows the parameters that it had "
                "then: patch or unpatch the model before wrapping it"
            )


def _parallel_wrappers() -> tuple[type, ...]:
    # Not imported for this: only a program that has imported it can have wrapped a model with it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ()
    return (nn.parallel.DistributedDataParallel, *sharded)
