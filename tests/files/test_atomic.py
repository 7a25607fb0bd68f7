"""Files are written whole or not at all, wherever they lie and whoever is killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordconv_patch.errors import ArgumentError, CoordConvPatchError, ExportError, WeightsError
from coordconv_patch.files import workplace
from coordconv_patch.files.atomic import obstacle_to_writing, part_name, replacement

FIRST, SECOND = "a" * 64, "b" * 64
"""Digests of parts."""


def write(path: Path, content: str = "new", **parts: str) -> None:
    """Write a file, and parts by digest."""
    with replacement(path, WeightsError) as temporary:
        temporary.write_text(content)
        for digest, text in parts.items():
            temporary.with_name(part_name(temporary.name, digest)).write_text(text)


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def assert_refused(path: Path, reason: str) -> None:
    before = names(path.parent) if path.parent.is_dir() else None
    with pytest.raises(WeightsError, match=reason) as refused:
        write(path)
    assert str(path)[:100] in str(refused.value)
    assert obstacle_to_writing(path) == str(refused.value)
    if before is not None:
        assert names(path.parent) == before


# --- targets ------------------------------------------------------------------------------------


def test_a_file_is_written_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "f", "one")
    write(tmp_path / "f", "two")
    assert (tmp_path / "f").read_text() == "two"
    assert names(tmp_path) == {"f"}


def test_a_relative_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("f"))
    assert (tmp_path / "f").read_text() == "new"


def make_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def make_device(path: Path) -> None:
    """The null device under another name; by a link, which needs no privileges."""
    path.symlink_to(os.devnull)


SPECIAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "a named pipe, not a regular file"),
    "socket": (make_socket, "a socket, not a regular file"),
    "device": (make_device, "a device, not a regular file"),
    "folder": (os.mkdir, "it is a folder; write a file name"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_not_a_regular_file_is_not_replaced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make, reason = SPECIAL[kind]
    make(Path(kind))
    before = os.stat(kind)
    assert_refused(Path(kind), reason)
    link = Path("link")
    link.symlink_to(kind)
    assert_refused(link, reason)
    assert os.stat(kind) == before
    assert link.is_symlink()


def test_the_null_device_is_not_replaced() -> None:
    before = os.stat(os.devnull)
    with pytest.raises(WeightsError, match="a device, not a regular file"):
        write(Path(os.devnull))
    assert os.stat(os.devnull).st_rdev == before.st_rdev


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/f", "the folder .*missing does not exist"),
        ("file/f", "the folder .*file does not exist"),
        ("n" * 300, r"File name too long \(ENAMETOOLONG\)"),
        ("null\0character", "null"),
        ("loop", r"symbolic links \(ELOOP\)"),
        ("loop/f", r"symbolic links \(ELOOP\)|does not exist"),
        ("away", "the folder .*nowhere does not exist"),
        ("protected", "it is write-protected"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_with_the_reason(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    (tmp_path / "away").symlink_to("nowhere/f")
    (tmp_path / "protected").touch(mode=0o444)
    if os.geteuid() == 0:  # who may write everything is told so
        real = os.access
        monkeypatch.setattr(
            os,
            "access",
            lambda path, mode, **ids: real(path, mode) and path.stat().st_mode & mode * 0o100,
        )
    assert_refused(tmp_path / name, reason)


# --- links, modes, owners -----------------------------------------------------------------------


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "f").write_text("old")
    first, second = tmp_path / "first", tmp_path / "second"
    first.symlink_to("second")
    second.symlink_to(folder / "f")
    write(first)
    assert os.readlink(first) == "second"
    assert os.readlink(second) == str(folder / "f")
    assert (folder / "f").read_text() == "new"
    assert names(folder) == {"f"}
    assert names(tmp_path) == {"elsewhere", "first", "second"}


def test_a_dangling_link_makes_the_file_that_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to("elsewhere/f")
    write(link)
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "f").read_text() == "new"


def test_a_linked_folder_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link" / "f")
    assert (tmp_path / "real" / "f").read_text() == "new"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_an_existing_files_mode_stays(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    path.chmod(mode)
    write(path, **{FIRST: str(mode)})
    assert path.read_text() == "new"
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_mode_that_the_umask_leaves(mask: int, tmp_path: Path) -> None:
    previous = os.umask(mask)
    try:
        write(tmp_path / "f")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o666 & ~mask


def test_an_existing_files_owner_stays_where_that_is_permitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.touch()
    given: list[tuple[int, int]] = []
    owner = path.stat()

    class Other:
        """The file's status, as if it belonged to somebody else."""

        st_uid, st_gid, st_mode = owner.st_uid + 1000, owner.st_gid + 1000, owner.st_mode

    def chown(path: Path, uid: int, gid: int) -> None:
        given.append((uid, gid))
        if uid != -1:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    real = Path.stat
    monkeypatch.setattr(os, "chown", chown)
    monkeypatch.setattr(
        Path, "stat", lambda self, **options: Other if self == path else real(self, **options)
    )
    write(path)
    assert given == [(Other.st_uid, Other.st_gid), (-1, Other.st_gid)]
    monkeypatch.undo()
    assert path.read_text() == "new"
    if os.geteuid() == 0:
        os.chown(path, 12345, 54321)
        write(path, "newer")
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [WeightsError, ExportError, ArgumentError])
@pytest.mark.parametrize("function", ["mkdir", "replace", "fsync", "chmod"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_an_error_of_the_system_names_the_path_and_leaves_nothing(
    failure: type[CoordConvPatchError],
    function: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with (
        pytest.raises(failure, match=f"cannot write .*f: {os.strerror(number)}") as refused,
        replacement(path, failure) as temporary,
    ):
        temporary.write_text("new")
    monkeypatch.undo()
    assert isinstance(refused.value.__cause__, OSError)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"f"}


def write_and(path: Path, meanwhile: Callable[[Path], object]) -> None:
    """Write a file, while something happens to its temporary one."""
    with replacement(path, WeightsError) as temporary:
        temporary.write_text("new")
        meanwhile(temporary)


def raising(error: BaseException) -> Callable[[Path], None]:
    def function(temporary: Path) -> None:
        raise error

    return function


def test_an_error_while_the_file_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(WeightsError, match=r"cannot write .*f: No space left"):
        write_and(path, raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(KeyboardInterrupt):
        write_and(path, raising(KeyboardInterrupt()))
    assert path.read_text() == "old"
    assert names(tmp_path) == {"f"}


def test_a_folder_that_vanishes_is_an_error_with_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(WeightsError, match=r"cannot write .*f: No such file or directory"):
        write_and(folder / "f", lambda temporary: shutil.rmtree(folder))
    assert names(tmp_path) == set()


def test_a_target_that_becomes_a_pipe_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(WeightsError, match="a named pipe, not a regular file"):
        write_and(path, lambda temporary: os.mkfifo(path))
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert names(tmp_path) == {"f"}


def test_files_and_folders_are_brought_to_the_disk_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    synced, replaced = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        synced(descriptor)
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("sync folder" if is_folder else "sync file")

    def replace(source: Path, target: Path) -> None:
        replaced(source, target)
        events.append("move part" if target.name.endswith(".data") else "move file")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "f", **{FIRST: "weights"})
    files = ["sync file", "sync file"]
    assert events == [*files, "move part", "sync folder", "move file", "sync folder"]


# --- parts --------------------------------------------------------------------------------------


def test_parts_come_and_go_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    other = tmp_path / part_name("g", FIRST)
    other.write_text("of another file")
    mine = tmp_path / "f.data"
    mine.write_text("the user's own")
    write(path, "1", **{FIRST: "one"})
    assert (tmp_path / part_name("f", FIRST)).read_text() == "one"
    write(path, "2", **{SECOND: "two"})
    assert names(tmp_path) == {"f", part_name("f", SECOND), other.name, mine.name}
    write(path, "3")
    assert names(tmp_path) == {"f", other.name, mine.name}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_between_parts_and_file_leaves_the_old_pair(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write(path, "1", **{FIRST: "one"})
    real, calls = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(WeightsError, match="No space left"):
        write(path, "2", **{SECOND: "two"})
    assert path.read_text() == "1"
    assert (tmp_path / part_name("f", FIRST)).read_text() == "one"
    monkeypatch.undo()
    write(path, "1", **{FIRST: "one"})
    assert names(tmp_path) == {"f", part_name("f", FIRST)}


# --- leftovers and other writers ----------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from coordconv_patch.files.atomic import replacement
from coordconv_patch.errors import WeightsError
with replacement(Path(sys.argv[1]), WeightsError) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    signal.pause()
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert process.stdout is not None
    process.stdout.close()


def test_what_a_killed_run_left_is_swept_and_what_a_living_one_needs_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "f"
    mine = tmp_path / ".coordconv_patch-mine"
    mine.mkdir()
    writer = start_writer(path)
    try:
        before = names(tmp_path)
        assert len(before) == 2
        write(path, "one")
        write(path, "two")
        assert names(tmp_path) == before | {"f"}  # the living writer's folder stays
    finally:
        stop(writer)
    assert names(tmp_path) == before | {"f"}
    write(tmp_path / "another", "three")
    assert names(tmp_path) == before | {"f", "another"}  # each target's leftovers are its own
    write(path, "four")
    assert names(tmp_path) == {"f", "another", mine.name}
    assert path.read_text() == "four"


def test_a_file_or_link_with_a_leftovers_name_is_not_followed(tmp_path: Path) -> None:
    path, precious = tmp_path / "f", tmp_path / "precious"
    precious.mkdir()
    (precious / "thing").touch()
    link = tmp_path / f"{workplace._prefix(path)}link"
    link.symlink_to("precious")
    file = tmp_path / f"{workplace._prefix(path)}file"
    file.touch()
    write(path)
    assert (precious / "thing").exists()
    assert names(tmp_path) == {"f", "precious", link.name, file.name}


def test_threads_that_write_one_file_leave_one_of_theirs_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for step in range(20):
                text = f"{index} {step} " * 1000
                digest = f"{index:032x}{step:032x}"[::-1]
                write(path, text, **{digest: text})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    (part,) = names(tmp_path) - {"f"}
    assert (tmp_path / part).read_text() == path.read_text()


def test_leftovers_without_locks_go_when_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems know no locks."""

    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    path = tmp_path / "f"
    young, old = (tmp_path / f"{workplace._prefix(path)}{name}" for name in ("young", "old"))
    for leftover in (young, old):
        leftover.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    write(path)
    assert path.read_text() == "new"
    assert names(tmp_path) == {"f", young.name}


def test_a_folder_that_others_keep_locked_is_an_error_and_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workplace, "_LONGEST_WAIT", 0.1)
    with (
        workplace.locked(tmp_path),
        pytest.raises(WeightsError, match=r"another process has kept the folder .* locked"),
    ):
        write(tmp_path / "f")
    write(tmp_path / "f")
    assert names(tmp_path) == {"f"}


def test_a_lock_does_not_outlive_its_holder_in_a_forked_child(tmp_path: Path) -> None:
    with workplace.locked(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        started = time.monotonic()
        write(tmp_path / "f")
        assert time.monotonic() - started < 5
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_may_not_be_read_is_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_list = os.open, os.listdir

    def refuse(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(path: Any, *args: Any, **options: Any) -> Any:
            if Path(path) == tmp_path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return real(path, *args, **options)

        return function

    monkeypatch.setattr(os, "open", refuse(real_open))
    monkeypatch.setattr(os, "listdir", refuse(real_list))
    write(tmp_path / "f")
    monkeypatch.undo()
    assert names(tmp_path) == {"f"}
