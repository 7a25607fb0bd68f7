"""The entry of ``coordconv-patch``: runs a command, and turns a user's mistake into a message."""

from __future__ import annotations

import sys

from coordconv_patch.errors import (
    CoordConvPatchError,
    ExportError,
    MissingPackageError,
    PatchError,
)
from coordconv_patch.packages import require_packages

__all__ = ["main"]


def main() -> None:
    """Run the command line; a user's mistake gets a message and an exit code, no traceback."""
    try:
        require_packages("the command line", "typer", "rich")
    except MissingPackageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from rich.markup import escape

    from coordconv_patch.cli.commands import app
    from coordconv_patch.cli.console import errors

    try:
        app()
    except CoordConvPatchError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1 if isinstance(error, (ExportError, PatchError)) else 2)


if __name__ == "__main__":
    main()
