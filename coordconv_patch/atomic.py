"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["obstacle_to_writing", "replacing"]


def obstacle_to_writing(path: Path) -> str:
    """Why a file cannot be written there, for a message; empty if it can."""
    if path.is_dir():
        return f"cannot write {path}: it is a folder; write a file name"
    if not path.parent.is_dir():
        return f"cannot write {path}: the folder {path.parent} does not exist"
    return ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside ``path``.

    If the block succeeds, every file that it left in that folder takes its place
    beside ``path``, with the permissions that a new file gets there (safetensors'
    own files are private); if it fails, nothing remains of it.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        for written in sorted(Path(folder).iterdir()):
            written.chmod(mode)
            os.replace(written, path.parent / written.name)
