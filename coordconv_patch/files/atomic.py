"""Write files whole or not at all, wherever a run is killed.

A file is written in a temporary folder beside its target, brought to the disk, and moved into the
target's place by one rename, which a reader sees done or not done.

A file may have *parts*, further files that it names (the weights of a large ONNX graph). A part's
name tells its content, so no part ever replaces another one: the parts come first, then the file
that names them, and parts that it does not name go last. A kill at any moment leaves the old file
with its own parts or the new one with its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordconv_patch.errors import CoordConvPatchError, path_text
from coordconv_patch.files.workplace import locked, names_in, workplace

__all__ = ["obstacle_to_writing", "os_errors_reported", "part_name", "replacement"]

_DIGEST_DIGITS = 16


def obstacle_to_writing(path: Path) -> str:
    """Why a file cannot be written there, for a message; empty if it can."""
    obstacle = _obstacle(path)
    return f"cannot write {path_text(path)}: {obstacle}" if obstacle else ""


def part_name(name: str, digest: str) -> str:
    """The name of a part of a file, by the file's name and a digest of the part's content.

    The digest is hexadecimal, of 16 digits or more.
    """
    return f"{name}.{digest[:_DIGEST_DIGITS]}.data"


@contextmanager
def replacement(path: Path, failure: type[CoordConvPatchError]) -> Iterator[Path]:
    """A path in a temporary folder, on which to write the file that takes the place of ``path``.

    If the block succeeds, the file takes its place, and so do its parts (see :func:`part_name`)
    that the block has left beside it. Symbolic links are followed: the file that they point to
    is replaced. An existing file's mode stays, and where permitted its owner; a new file gets
    the permissions that new files get there. If the block fails, nothing remains of it.

    Raises:
        CoordConvPatchError: As ``failure`` says, if the file cannot be written: the target is not a
            regular file, its folder does not exist, or any other ``OSError``; it names the path.
    """
    with os_errors_reported(f"cannot write {path_text(path)}", failure):
        obstacle = obstacle_to_writing(path)
        if obstacle:
            raise failure(obstacle)
        target = _followed(path)
        with workplace(target) as folder:
            yield folder / target.name
            _put_in_place(folder, target)


@contextmanager
def os_errors_reported(what: str, failure: type[CoordConvPatchError]) -> Iterator[None]:
    """While entered, any ``OSError`` becomes a ``failure`` that says what could not be done."""
    try:
        yield
    except OSError as error:
        raise failure(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, type(error).__name__)})"


def _followed(path: Path) -> Path:
    """The file that a path means; of a symbolic link, what it points to."""
    return Path(os.path.realpath(path))


def _obstacle(path: Path) -> str:
    try:
        target = _followed(path)
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        folder = target.parent if path.is_symlink() else path.parent
        return "" if folder.is_dir() else f"the folder {path_text(folder)} does not exist"
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        return _reason(error)
    if stat.S_ISDIR(mode):
        return "it is a folder; write a file name"
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        return f"it is {kind}, not a regular file; write a file name"
    effective = os.access in os.supports_effective_ids
    writable = os.access(target, os.W_OK, effective_ids=effective)
    return "" if writable else "it is write-protected"


def _put_in_place(folder: Path, target: Path) -> None:
    """Move the file and its parts from their temporary folder to the target's place."""
    written = folder / target.name
    parts = sorted(path for path in folder.iterdir() if path != written)
    assert all(_is_part(part.name, target) for part in parts), parts
    _take_over_permissions([written, *parts], folder, target)
    for path in (written, *parts):
        _bring_to_disk(path)
    with locked(target.parent):
        obstacle = _obstacle(target)  # it may have come in the meantime
        if obstacle:
            raise OSError(obstacle)
        for part in parts:
            os.replace(part, target.parent / part.name)
        if parts:
            _bring_to_disk(target.parent)
        os.replace(written, target)
        _bring_to_disk(target.parent)
        kept = {part.name for part in parts}
        for name in names_in(target.parent):
            if _is_part(name, target) and name not in kept:
                with contextlib.suppress(OSError):
                    os.unlink(target.parent / name)


def _is_part(name: str, target: Path) -> bool:
    pattern = rf"{re.escape(target.name)}\.[0-9a-f]{{{_DIGEST_DIGITS}}}\.data"
    return re.fullmatch(pattern, name) is not None


def _take_over_permissions(written: list[Path], folder: Path, target: Path) -> None:
    """Give files the mode and the owner of the target, or those that a new file gets there."""
    try:
        existing = target.stat()
    except FileNotFoundError:
        probe = folder / "mode"
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        for path in written:
            os.chmod(path, mode)
        return
    for path in written:
        now = path.stat()
        if (now.st_uid, now.st_gid) != (existing.st_uid, existing.st_gid):
            _give(path, existing.st_uid, existing.st_gid)
        os.chmod(path, stat.S_IMODE(existing.st_mode))


def _give(path: Path, user: int, group: int) -> None:
    """Change a file's owner as far as that is permitted."""
    if sys.platform != "win32":
        # Who is not privileged may give files to a group, but not to another user.
        for owner in (user, -1):
            with contextlib.suppress(PermissionError):
                os.chown(path, owner, group)
                return


def _bring_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    try:
        opened = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    except PermissionError:  # a folder that cannot be read
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(opened)
