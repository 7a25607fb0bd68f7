"""The entry of ``coordconv-patch``, which first looks whether its packages are there."""

from __future__ import annotations

import sys

from coordconv_patch.errors import MissingPackageError
from coordconv_patch.packages import require_packages

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        require_packages("the command line", "typer", "rich")
    except MissingPackageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from coordconv_patch.cli.commands import app
    from coordconv_patch.cli.outcome import run

    run(app)


if __name__ == "__main__":
    main()
