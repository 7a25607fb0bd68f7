"""Where the command line prints."""

from __future__ import annotations

from rich.console import Console

__all__ = ["console", "errors"]

console = Console()
"""Results: standard output."""
errors = Console(stderr=True)
"""Errors and notes: standard error."""
