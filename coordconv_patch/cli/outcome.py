"""How a command ends: what its errors say, and its exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from rich.markup import escape

from coordconv_patch.cli.console import errors, told
from coordconv_patch.cli.wording import in_options
from coordconv_patch.errors import (
    CoordConvPatchError,
    ExampleInputsError,
    ExportError,
    PatchError,
    first_line,
)

__all__ = ["run"]


def run(command: Callable[[], Any]) -> None:
    """Run the command line; a user's mistake gets a message and an exit code, no traceback."""
    if sys.stdout is None:
        _fail("standard output is closed", 2)
    if hasattr(sys.stdout, "reconfigure"):  # a pipe on Windows may know no bars
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            with told():
                command()
        finally:
            sys.stdout.flush()
    except CoordConvPatchError as error:
        _fail(_in_words(error), _exit_code(error))
    except OSError as error:
        failure = _output_failure()
        if failure is None:
            raise
        _fail(f"standard output cannot be written: {first_line(failure)}", 1, error)


def _fail(text: str, code: int, cause: BaseException | None = None) -> NoReturn:
    errors.print(f"[bold red]error:[/] {escape(text)}", highlight=False)
    raise SystemExit(code) from cause


def _output_failure() -> OSError | None:
    """Why what was printed cannot be written; it is thrown away then, so that Python can end."""
    try:
        print(flush=True)  # the error may be another one: only what fails again is told
    except OSError as error:
        with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return error
    return None


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
