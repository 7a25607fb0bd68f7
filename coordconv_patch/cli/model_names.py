"""Names of models with arguments behind them: ``resnet18?num_classes=12&in_chans=1``."""

from __future__ import annotations

import ast
from typing import Any

from coordconv_patch.errors import ModelSourceError

__all__ = ["name_and_arguments"]


def name_and_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """A name, and the keyword arguments that are written behind it; none are.

    Values are Python's numbers, ``True``, ``False``, ``None`` and lists; anything else is a string.

    Raises:
        ModelSourceError: If what is behind the question mark is not ``name=value`` pairs.
    """
    name, _, query = text.partition("?")
    arguments: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier() or key in arguments:
            raise ModelSourceError(
                f"model {text!r}: write arguments behind the name as "
                f"{name}?num_classes=12&drop_rate=0.1, each once"
            )
        arguments[key] = _value(value)
    return name, arguments


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
