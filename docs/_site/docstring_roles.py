"""Docstrings refer to each other by Sphinx's roles; the site shows them as links and code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

import coordconv_patch

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([\w.]+)`")


class DocstringRoles(Extension):
    """``:func:`patch``` becomes a link where it is a public name of the package, else code."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(_shown, obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _shown(match: re.Match[str]) -> str:
    name = match[1].removeprefix("coordconv_patch.").lstrip(".")
    last = name.rpartition(".")[2]
    if last in coordconv_patch.__all__:
        return f"[`{last}`][coordconv_patch.{last}]"
    return f"`{name if match[1].startswith('torch') else last}`"
