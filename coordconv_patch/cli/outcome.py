"""How a command ends: what its errors say, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.markup import escape

from coordconv_patch.cli.console import errors, told
from coordconv_patch.cli.wording import in_options
from coordconv_patch.errors import (
    CoordConvPatchError,
    ExampleInputsError,
    ExportError,
    PatchError,
)

__all__ = ["run"]


def run(command: Callable[[], Any]) -> None:
    """Run the command line; a user's mistake gets a message and an exit code, no traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a pipe on Windows may know no bars
        sys.stdout.reconfigure(errors="replace")
    try:
        with told():
            command()
    except CoordConvPatchError as error:
        errors.print(f"[bold red]error:[/] {escape(_in_words(error))}", highlight=False)
        sys.exit(_exit_code(error))


def _in_words(error: CoordConvPatchError) -> str:
    """What an error says, with what to write on the command line."""
    text = in_options(str(error))
    if isinstance(error, ExampleInputsError):
        text += ". Is --input the shape that it takes, batch first, such as 1,3,224,224?"
    return text


def _exit_code(error: CoordConvPatchError) -> int:
    """1 if the work failed, 2 if the command or its input was wrong."""
    failed = isinstance(error, (ExportError, PatchError))
    return 1 if failed and not isinstance(error, ExampleInputsError) else 2
