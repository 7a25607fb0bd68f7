"""Whether a picture can be drawn and written, asked before anything else is done."""

from __future__ import annotations

import os
from pathlib import Path

from coordconv_patch.errors import ArgumentError
from coordconv_patch.files.atomic import obstacle_to_writing
from coordconv_patch.packages import require_packages

__all__ = ["check_picture"]


def check_picture(path: str | os.PathLike[str]) -> Path:
    """Check that a picture can be drawn and written; returns its path.

    Args:
        path: The picture's file.

    Raises:
        ArgumentError: If the name's ending is none of an image, or the folder does not exist.
        MissingPackageError: If matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ArgumentError(f"picture {path}: write a name that ends in .png, .svg or .pdf")
    obstacle = obstacle_to_writing(path)
    if obstacle:
        raise ArgumentError(obstacle)
    require_packages(f"picture {path}", "matplotlib")
    return path
