"""Where the command line prints."""

from __future__ import annotations

import sys

from rich.console import Console

from coordconv_patch.display.shown import Shown

__all__ = ["console", "errors", "show"]

console = Console()
"""Results: standard output."""
errors = Console(stderr=True)
"""Errors and notes: standard error."""


def show(shown: Shown) -> None:
    """Print a result: as wide as the terminal; into a pipe or a file as wide as need be."""
    if sys.stdout.isatty():
        console.print(shown)
    else:
        print(shown)
