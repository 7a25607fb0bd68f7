"""Conversions by torch that cannot carry coordinates along, refused by the layer's name.

torch walks through a model's modules and asks nobody, so the layers refuse when they are
reached: ``torch.jit.script`` calls ``__prepare_scriptable__`` on each, and
``torch.utils.mkldnn.to_mkldnn`` asks each for its children once it has replaced it.
"""

from __future__ import annotations

import inspect
from types import FrameType
from typing import NoReturn

from torch import nn

from coordconv_patch.errors import PatchError

__all__ = ["refuse_mkldnn", "refuse_script"]


_MKLDNN = "torch.utils.mkldnn"
_CONVERTERS = ("torch.jit._script", _MKLDNN)
"""The modules whose functions walk through a model."""


def refuse_script(layer: nn.Module) -> NoReturn:
    """Say that TorchScript cannot compile a coordinate layer, and what can be done instead.

    Raises:
        PatchError: Always.
    """
    raise PatchError(
        f"torch.jit.script cannot compile {_name_of(layer)}: its "
        "coordinate map is made by Python code. Fold the model and trace it, "
        "torch.jit.trace(coordconv_patch.fold(model), example), or use torch.compile, "
        "torch.export or export_onnx"
    )


def refuse_mkldnn(layer: nn.Module) -> None:
    """Refuse ``to_mkldnn``, which makes a plain convolution of a coordinate layer's weight.

    Raises:
        PatchError: If it is what asks; nothing happens otherwise.
    """
    frame = inspect.currentframe()
    asking = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    if asking is not None and asking.f_globals.get("__name__") == _MKLDNN:
        raise PatchError(
            f"torch.utils.mkldnn.to_mkldnn would leave the coordinates of "
            f"{_name_of(layer)} behind: give the model itself MKLDNN tensors, "
            "model(x.to_mkldnn()), or use torch.compile, which calls oneDNN too"
        )


def _name_of(layer: nn.Module) -> str:
    """The qualified name of a layer in the outermost module that is being converted."""
    name = ""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        is_converting = frame.f_globals.get("__name__") in _CONVERTERS
        values = frame.f_locals.values() if is_converting else ()
        for root in [value for value in values if isinstance(value, nn.Module)]:
            names = [name for name, module in root.named_modules() if module is layer]
            name = names[0] if names and names[0] else name
        frame = frame.f_back
    kind = f"the coordinate layer {type(layer).__name__}"
    return f"{name!r} ({kind})" if name else kind
