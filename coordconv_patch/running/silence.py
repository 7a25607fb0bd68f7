"""Keep the output of other people's code away, in one thread, while that code runs.

Exporters and folding functions print and log what our reports say better. What is shared by
all threads of a process (``sys.stdout``, the log handlers, the warning filters) is not
switched off here: it asks who is writing, and drops what comes from silenced threads only. So
silences may overlap in any order, and what other threads write meanwhile is not lost.

File descriptors cannot ask. :func:`descriptors_silenced` is for C++ libraries, which write to
them directly; one thread at a time uses it, for as short as it can.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, cast

from coordconv_patch.running.forks import after_fork, fork_safe

__all__ = ["descriptors_silenced", "output_silenced", "warnings_ignored"]

_lock = fork_safe(threading.Lock())
_descriptors_lock = fork_safe(threading.RLock())


class _OfThread(threading.local):
    """How often the running thread is inside of :func:`output_silenced` now."""

    depth = 0


_silences = _OfThread()


@contextlib.contextmanager
def output_silenced(level: int = logging.WARNING) -> Iterator[None]:
    """Drop what this thread prints to ``sys.stdout`` and ``sys.stderr``, and logs up to a level."""
    quiet = _QuietThread(threading.get_ident(), level)
    _install_streams()
    _silences.depth += 1
    handlers = _log_handlers()
    for handler in handlers:
        handler.addFilter(quiet)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(quiet)
        _silences.depth -= 1
        _remove_streams()


@contextlib.contextmanager
def warnings_ignored(category: type[Warning] = Warning) -> Iterator[None]:
    """Ignore the warnings of a category that this thread raises.

    :class:`warnings.catch_warnings` would save and restore the filters of the whole process,
    which mixes them up for good where two threads do so at a time.
    """
    if getattr(sys.flags, "context_aware_warnings", False):  # Python 3.14: it is safe there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category)
            yield
        return
    ours = _ThisThread()
    entry: Any = ("ignore", ours, category, None, 0)
    filters = cast("list[Any]", warnings.filters)
    filters.insert(0, entry)
    try:
        yield
    finally:
        # Copies of the list that somebody else has made meanwhile may keep the entry.
        ours.thread = None
        for entries in (filters, cast("list[Any]", warnings.filters)):
            with contextlib.suppress(ValueError):
                entries.remove(entry)


@contextlib.contextmanager
def descriptors_silenced() -> Iterator[None]:
    """Send what the process writes to the descriptors 1 and 2, C++ libraries included, nowhere.

    One thread at a time is in here, and other threads that print wait for it. What they write
    past ``sys.stdout`` and ``sys.stderr`` is lost, so be quick.
    """
    with _descriptors_lock, output_silenced(logging.CRITICAL), contextlib.ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nowhere)
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # it is closed: nothing can be written to it
                copy = os.dup(descriptor)
                stack.callback(os.close, copy)
                _silenced[descriptor] = (threading.get_ident(), copy)
                stack.callback(_restore_descriptor, descriptor, copy)
                os.dup2(nowhere, descriptor)
        yield


_silenced: dict[int, tuple[int, int]] = {}
"""The descriptors that lead nowhere now: the thread that did so, and a copy of each as it was."""


def _restore_descriptor(descriptor: int, copy: int) -> None:
    os.dup2(copy, descriptor)
    _silenced.pop(descriptor, None)


class _ThisThread:
    """In the place of a warning filter's pattern: matches in the thread that made it."""

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()

    def match(self, text: str) -> bool:
        """Whether the running thread's warnings are to be ignored."""
        return threading.get_ident() == self.thread


class _QuietThread(logging.Filter):
    """A log filter that drops the records of one thread, up to a level."""

    def __init__(self, thread: int, level: int) -> None:
        super().__init__()
        self.thread = thread
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return threading.get_ident() != self.thread or record.levelno > self.level


def _log_handlers() -> list[logging.Handler]:
    """Every handler that a logger of this process has now."""
    loggers = [logging.root, *list(logging.root.manager.loggerDict.values())]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    return handlers if logging.lastResort is None else [*handlers, logging.lastResort]


class _AudibleStream:
    """Stands before ``sys.stdout`` or ``sys.stderr``; what silenced threads write is dropped.

    A log handler that is made meanwhile may keep it, so it passes on what comes afterwards.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, unless the running thread is silenced; returns its length."""
        if _silences.depth:
            return len(text)
        with _descriptors_lock:
            return int(self.stream.write(text))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts, one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stream"], name)


_threads_inside = 0

_KEPT_ALIVE: deque[_AudibleStream] = deque(maxlen=16)
"""Streams of late: ``print`` in another thread may be writing to one, and holds no reference.

It may wait there for as long as others take turns, so what stands before a stream is made once.
"""


def _install_streams() -> None:
    global _threads_inside
    with _lock:
        _threads_inside += 1
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            # Where another thread is silenced it is there already, unless somebody replaced it.
            if stream is not None and not isinstance(stream, _AudibleStream):
                setattr(sys, name, _audible(stream))


def _audible(stream: Any) -> _AudibleStream:
    for kept in _KEPT_ALIVE:
        if kept.stream is stream:
            return kept
    _KEPT_ALIVE.append(_AudibleStream(stream))
    return _KEPT_ALIVE[-1]


def _remove_streams() -> None:
    global _threads_inside
    with _lock:
        _threads_inside -= 1
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if _threads_inside == 0 and isinstance(stream, _AudibleStream):
                setattr(sys, name, stream.stream)


def _hear_again() -> None:
    """In a child process: only the thread that forked is here, and silences of others are over."""
    global _threads_inside
    this = threading.get_ident()
    for descriptor, (thread, copy) in list(_silenced.items()):
        if thread != this:
            _restore_descriptor(descriptor, copy)
    for handler in _log_handlers():
        for quiet in [each for each in handler.filters if isinstance(each, _QuietThread)]:
            if quiet.thread != this:
                handler.removeFilter(quiet)
    filters = cast("list[Any]", warnings.filters)
    filters[:] = [
        entry
        for entry in filters
        if not isinstance(entry[1], _ThisThread) or entry[1].thread == this
    ]
    _threads_inside = _silences.depth + 1
    _remove_streams()


after_fork(_hear_again)
