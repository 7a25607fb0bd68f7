"""Where the command line prints, and how much of it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from coordconv_patch.cli.wording import in_options
from coordconv_patch.display.shown import Shown

__all__ = ["be_quiet", "be_verbose", "console", "errors", "note", "show", "told"]

console = Console()
"""What was done: standard output; quiet with ``-q``."""
errors = Console(stderr=True)
"""Errors: standard error."""
_notes = Console(stderr=True)
"""What else to know: standard error; quiet with ``-q``."""

_PACKAGE = "coordconv_patch"


def show(shown: Shown) -> None:
    """Print a result: as wide as the terminal; into a pipe or a file as wide as need be."""
    if console.quiet:
        return
    if sys.stdout.isatty():
        console.print(shown)
    else:
        print(shown)


def note(text: str) -> None:
    """Tell something that is worth knowing and no error."""
    _notes.print(f"[yellow]note:[/] {escape(in_options(text))}", highlight=False, soft_wrap=True)


def be_verbose(wanted: bool) -> None:
    """Tell what is done and why, too: the log from DEBUG on, and every warning."""
    if wanted:
        logging.getLogger(_PACKAGE).setLevel(logging.DEBUG)
        warnings.simplefilter("default")


def be_quiet(wanted: bool) -> None:
    """Tell errors alone, and what a command is there to print."""
    if wanted:
        console.quiet = _notes.quiet = True
        logging.getLogger(_PACKAGE).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


@contextmanager
def told() -> Iterator[None]:
    """While entered, the package's log and warnings come as notes; afterwards all is as before."""
    logger = logging.getLogger(_PACKAGE)
    level, handler = logger.level, _Notes()
    quiet = console.quiet, _notes.quiet
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        console.quiet, _notes.quiet = quiet


class _Notes(logging.Handler):
    """Prints a record: progress and such in pale letters, warnings as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            note(record.getMessage())
        else:
            text = escape(record.getMessage())
            _notes.print(f"[dim]{text}[/]", highlight=False, soft_wrap=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> Any:
    note(str(message))
