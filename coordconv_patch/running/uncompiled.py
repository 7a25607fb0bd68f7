"""Run what torch.compile has compiled as plain Python: its compiler would trace who looks on."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from coordconv_patch.running.torch_versions import set_dynamo_callback
from coordconv_patch.running.untouched import LOOK
from coordconv_patch.running.wrappers import is_compiled

__all__ = ["uncompiled"]


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """While entered, a model and its parts run as they are written, in this thread and in others.

    Hooks and torch function modes see such a run as any other; the compiler would trace them.
    Other models are left alone: torch's own stance ``force_eager`` is one for all threads, where
    what was compiled with ``fullgraph=True`` fails of it.
    """
    with LOOK:
        plain = [(vars(module), _plain(module)) for module in model.modules()]
        before = [(own, name, own.get(name, _ABSENT)) for own, new in plain for name in new]
        compiling = set_dynamo_callback(None)  # where compiled code looks at a model
        try:
            for own, new in plain:
                own.update(new)
            yield
        finally:
            set_dynamo_callback(compiling)
            for own, name, value in before:
                if value is _ABSENT:
                    own.pop(name, None)
                else:
                    own[name] = value


_ABSENT = object()


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes with which a compiled module runs as it is written; none of another."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    if is_compiled(module):
        return {"forward": module.get_submodule("_orig_mod").__call__}
    plain: dict[str, Any] = {}
    if vars(module).get("_compiled_call_impl") is not None:  # by module.compile()
        plain["_compiled_call_impl"] = None
    # Of a decorated method; torch.compiler.disable keeps the function by the same name.
    function = getattr(module.forward, "_torchdynamo_orig_callable", None)
    if function is not None and "forward" not in vars(module):
        plain["forward"] = types.MethodType(function, module)
    return plain
