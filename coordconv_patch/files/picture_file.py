"""Whether a picture can be drawn and written, asked before anything else is done."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from coordconv_patch.errors import ArgumentError
from coordconv_patch.files.atomic import obstacle_to_writing

__all__ = ["check_picture"]


def check_picture(path: str | os.PathLike[str], *, extra: str = "bench") -> Path:
    """Check that a picture can be drawn and written; returns its path.

    Args:
        path: The picture's file.
        extra: The package's extra that brings matplotlib to whoever wants such a picture.

    Raises:
        ArgumentError: If the name's ending is none of an image, the folder does not exist,
            or matplotlib is not installed; the message says what to install.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ArgumentError(f"picture {path}: write a name that ends in .png, .svg or .pdf")
    obstacle = obstacle_to_writing(path)
    if obstacle:
        raise ArgumentError(obstacle)
    if not importlib.util.find_spec("matplotlib"):
        raise ArgumentError(
            f"picture {path}: drawing needs matplotlib, which is not installed: run "
            f'pip install "coordconv-patch[{extra}]", or leave the picture out'
        )
    return path
