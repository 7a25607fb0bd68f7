"""The entry of ``coordconv-patch``: runs a command, and turns a user's mistake into a message."""

from __future__ import annotations

import sys

from coordconv_patch.errors import (
    CoordConvPatchError,
    ExampleInputsError,
    ExportError,
    MissingPackageError,
    PatchError,
)
from coordconv_patch.packages import require_packages

__all__ = ["main"]


def main() -> None:
    """Run the command line; a user's mistake gets a message and an exit code, no traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a pipe on Windows may know no bars
        sys.stdout.reconfigure(errors="replace")
    try:
        require_packages("the command line", "typer", "rich")
    except MissingPackageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from rich.markup import escape

    from coordconv_patch.cli.commands import app
    from coordconv_patch.cli.console import errors, told

    try:
        with told():
            app()
    except CoordConvPatchError as error:
        errors.print(f"[bold red]error:[/] {escape(_in_words(error))}", highlight=False)
        sys.exit(_exit_code(error))


def _in_words(error: CoordConvPatchError) -> str:
    """What an error says, with what to write on the command line."""
    from coordconv_patch.cli.wording import in_options

    text = in_options(str(error))
    if isinstance(error, ExampleInputsError):
        text += ". Is --input the shape that it takes, batch first, such as 1,3,224,224?"
    return text


def _exit_code(error: CoordConvPatchError) -> int:
    """1 if the work failed, 2 if the command or its input was wrong."""
    failed = isinstance(error, (ExportError, PatchError))
    return 1 if failed and not isinstance(error, ExampleInputsError) else 2


if __name__ == "__main__":
    main()
