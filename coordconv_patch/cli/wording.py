"""Messages of the package in the words of the command line: its options for Python's arguments."""

from __future__ import annotations

import ast
import re

__all__ = ["in_options"]

_OPTIONS = {
    "where": "--where",
    "coords": "--coords",
    "lowering": "--lowering",
    "lowerings": "--lowering",
    "exporter": "--exporter",
    "opset": "--opset",
    "tolerance": "--tolerance",
    "providers": "--provider",
    "disabled_optimizers": "--disable-optimizer",
    "batches": "--batch",
    "target": "--target",
    "threads": "--threads",
    "repeats": "--repeats",
    "path": "--out",
}
"""Options by the arguments that they set."""

_ARGUMENT = re.compile(rf"\b({'|'.join(_OPTIONS)})=(\[[^\]]*\]|'[^']*'|[\w.-]*\w)?")

_PHRASES = (
    ("(write|pass) dynamic_size=True", r"\1 --dynamic-size"),
    ("(write|pass) dynamic_size=False", "leave --dynamic-size out"),
    ("dynamic_size=True", "--dynamic-size"),
    ("dynamic_size=False", "no --dynamic-size"),
    ("dynamic_batch=False", "--static-batch"),
    ("dynamic_batch=True, but", "without --static-batch the batch is of any size, but"),
    (r"\bor None\b( for the exporter's choice)?", r"or leave it out\1"),
    (r"pass check=False to patch all the same", "in Python, check=False patches all the same"),
    (r"\bcheck_base=False", "in Python, load_coords(..., check_base=False)"),
    (r"\bplaces=True", "in Python, places=True"),
    (r" \(in Python: trusted=True\)", ""),
    (r"; where=lambda site: .* leaves such out", ""),
    (r"\bwhere=\.\.\.", "--where"),
    (r"\bexample_inputs=\.\.\.", "--input SHAPE"),
    (r"\bexample_inputs\b", "--input"),
    (r"here and to onnxruntime\.InferenceSession", "here, and the same to ONNX Runtime"),
)
"""What else is said otherwise, as regular expressions, in this order."""


def in_options(text: str) -> str:
    """A message with the command line's options in the place of Python's arguments."""
    for pattern, words in _PHRASES:
        text = re.sub(pattern, words, text)
    return _ARGUMENT.sub(_as_option, text)


def _as_option(match: re.Match[str]) -> str:
    option, value = _OPTIONS[match[1]], match[2]
    if value is None:
        return option
    if not value.startswith("["):
        return f"{option} {value}"
    try:
        items = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return f"{option} {value}"
    return " ".join(f"{option} {item}" for item in items)
