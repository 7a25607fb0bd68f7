"""Locks that a child process finds free, whatever other threads were doing when it was forked.

A fork copies a lock as it is, and not the thread that holds it: nobody would ever release it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["after_fork", "fork_safe", "freed"]


def after_fork(function: Callable[[], object]) -> None:
    """Call a function in every child that this process forks from now on, before anything else."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        os.register_at_fork(after_in_child=function)


def fork_safe(lock: Any) -> Any:
    """A lock of a module or an object that lasts as long as the process; freed in each child."""
    after_fork(lambda: freed(lock))
    return lock


def freed(lock: Any) -> None:
    """Free a lock in a child process, unless the thread that forked holds it: it runs on there."""
    if isinstance(lock, threading.Condition):
        lock._waiters.clear()  # type: ignore[attr-defined]  # threads that are not here
        lock = lock._lock  # type: ignore[attr-defined]
    is_ours = getattr(lock, "_is_owned", None)  # of locks that may be taken again; not of others
    if is_ours is None or not is_ours():
        lock._at_fork_reinit()  # as threading and logging do with theirs
