"""A temporary folder to write a file in, and the end of those that killed runs have left.

A writer locks its folder for as long as it lives, and the system releases the locks of the dead. So
the next writer to the same target can tell which folders nobody needs any more.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["locked", "names_in", "workplace"]

_LONGEST_WAIT = 30.0
"""Seconds to wait for another writer in the same folder, which needs milliseconds."""
_CERTAINLY_DEAD = 24 * 3600.0
"""Seconds after which a leftover counts as one where the file system knows no locks."""


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target; those of dead writers to the same target go."""
    with ExitStack() as at_the_end:
        with locked(target.parent):
            # Under the lock, so that nobody takes the folder for a dead writer's before it is
            # locked itself.
            _sweep(target)
            folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
            at_the_end.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = _open_folder(folder)
            at_the_end.callback(_close, lock)
            _lock_now(lock)
        yield folder


def _prefix(target: Path) -> str:
    # Not the target's name, which may be as long as names can be.
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()
    return f".coordconv_patch-{digest[:16]}-"


def _sweep(target: Path) -> None:
    """Remove what killed writers to a target have left."""
    for name in names_in(target.parent):
        leftover = target.parent / name
        if name.startswith(_prefix(target)) and leftover.is_dir() and not leftover.is_symlink():
            lock = _open_folder(leftover)
            try:
                if _is_dead(leftover, lock):
                    shutil.rmtree(leftover, ignore_errors=True)
            finally:
                _close(lock)


def _is_dead(leftover: Path, lock: int | None) -> bool:
    """Whether the writer whose folder this was has ended."""
    try:
        if _lock_now(lock):
            return True
    except BlockingIOError:
        return False
    try:
        return time.time() - leftover.stat().st_mtime > _CERTAINLY_DEAD
    except OSError:  # gone in the meantime
        return False


def names_in(folder: Path) -> list[str]:
    """Names of what a folder holds; none if it may not be read."""
    try:
        return os.listdir(folder)
    except PermissionError:  # files can be written into folders that cannot be read
        return []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While entered, no other writer looks for leftovers or moves files in a folder."""
    lock = _open_folder(folder)
    try:
        started = time.monotonic()
        while True:
            try:
                _lock_now(lock)
                break
            except BlockingIOError:
                if time.monotonic() - started > _LONGEST_WAIT:
                    raise TimeoutError(
                        f"another process has kept the folder {folder} locked for "
                        f"{_LONGEST_WAIT:.0f} s"
                    ) from None
                time.sleep(0.005)
        yield
    finally:
        _close(lock)


def _open_folder(folder: Path) -> int | None:
    """A descriptor on which to lock a folder; ``None`` if there is none, or it may not be read."""
    if sys.platform == "win32":
        return None
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (PermissionError, FileNotFoundError, NotADirectoryError):
        return None


def _lock_now(lock: int | None) -> bool:
    """Lock an open folder; false where the file system knows no locks.

    A BlockingIOError if somebody else has locked it.
    """
    if sys.platform == "win32" or lock is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _close(lock: int | None) -> None:
    if lock is not None and sys.platform != "win32":
        # A process that was forked in the meantime has the descriptor too, and would hold on.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)
