"""Known causes of failures that are not the patch's, recognised by their messages."""

from __future__ import annotations

import re

__all__ = ["cause_of"]

_CAUSES = {
    "draws random numbers": "the model draws noise in evaluation",
    r"_is_all_true": "the exporters know no `_is_all_true`",
    r"Pad_Fusion": "ONNX Runtime's optimizer Pad_Fusion",
}


def cause_of(problem: str) -> str:
    """The cause in words; empty if it is not known."""
    return next((name for pattern, name in _CAUSES.items() if re.search(pattern, problem)), "")
