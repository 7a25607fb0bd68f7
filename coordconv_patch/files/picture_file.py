"""Pictures: whether one can be drawn and written, asked first, and the writing of it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from coordconv_patch.arguments import check_path
from coordconv_patch.errors import ArgumentError, CoordConvPatchError, path_text
from coordconv_patch.files.atomic import obstacle_to_writing, replacement
from coordconv_patch.packages import require_packages

__all__ = ["check_picture", "write_figure"]


def check_picture(path: str | os.PathLike[str]) -> Path:
    """Check that a picture can be drawn and written; returns its path.

    Args:
        path: The picture's file.

    Raises:
        ArgumentError: If this is not a file name, the name's ending is none of an image, or the
            folder does not exist.
        MissingPackageError: If matplotlib is not installed.
    """
    path = check_path("path", path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ArgumentError(
            f"picture {path_text(path)}: write a name that ends in .png, .svg or .pdf"
        )
    obstacle = obstacle_to_writing(path)
    if obstacle:
        raise ArgumentError(obstacle)
    require_packages(f"picture {path}", "matplotlib")
    return path


def write_figure(
    figure: Any, path: Path, failure: type[CoordConvPatchError] = ArgumentError
) -> None:
    """Write a figure of matplotlib's, whole or not at all; the file's kind is that of its ending.

    Args:
        figure: The figure.
        path: A file that :func:`check_picture` has passed.
        failure: The error to raise if it cannot be drawn or written.

    Raises:
        CoordConvPatchError: As ``failure`` says.
    """
    saved = io.BytesIO()  # matplotlib's writer of PDF files tells a full disk by an AttributeError
    try:
        figure.savefig(saved, format=path.suffix.removeprefix("."))
    except ValueError as error:  # more pixels along an axis than it draws
        raise failure(f"cannot draw {path_text(path)}: {error}") from error
    with replacement(path, failure) as temporary:
        temporary.write_bytes(saved.getbuffer())
