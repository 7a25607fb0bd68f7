"""What the caller of ``load_state_dict`` asked for, which torch does not tell its modules.

``nn.Module.load_state_dict(..., strict=False)`` calls every module's ``_load_from_state_dict``
with ``strict=True``, and applies the caller's choice only when all of them have run: see
https://github.com/pytorch/pytorch/issues/156177 ("nn.Module._load_from_state_dict is always
called with strict=True", open). Hooks on loading get the same ``True``. A coordinate layer has
to know, because a plain checkpoint is complete for it when loading is strict, and a missing key
has to be reported when it is not. So the choice is read where it is: in that function's frame.
Once torch passes it on, this module can go.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["load_in_progress"]


def load_in_progress() -> Mapping[str, Any]:
    """The local variables of the innermost ``load_state_dict`` that runs, empty if none does.

    Its arguments among them: ``strict``, and the whole ``state_dict``.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return frame.f_locals
        frame = frame.f_back
    return {}
