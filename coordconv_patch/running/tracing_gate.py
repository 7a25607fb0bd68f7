"""Let one thread at a time trace with torch.fx, and keep its tracing away from the others.

While torch.fx traces, it replaces ``nn.Module.__call__`` and ``nn.Module.__getattr__`` for the
whole process. A forward pass of any model in any other thread then runs into a tracer that
does not know it, and two tracers that overlap put back each other's replacements, so that
``nn.Module.__call__`` stays broken for good. torch.export traces in the same way.

So :func:`tracing_alone` puts a gate before the function with which torch.fx begins its
replacements (``torch.fx._symbolic_trace._new_patcher``), the first time that it is entered. From
then on each replaced method asks for the thread: all threads but the one that traces run the
original. And while a thread is in :func:`tracing_alone`, the gate is closed:

- other threads that begin a trace of their own, by torch.export perhaps, wait at the gate. If
  one traces already, it is this thread that waits;
- no other thread compiles: torch.compile would read the replacements, and note them down.

Two traces of *other* code still put back each other's replacements. torch.export itself changes
more of the process for as long as it runs, whoever calls it: other threads' convolutions are
computed without oneDNN (the last bits differ), and a model that torch.compile has compiled may
raise a KeyError there.

Before torch 2.14 the flag "is tracing" is one for the whole process: a compiled model that another
thread calls at that moment raises, and after two traces that overlap it stays set for good. So the
gate makes torch.fx ask for the thread there too.

An interrupt (Ctrl-C) at a bad moment makes torch.fx leave its replacements, and its note of them;
see :mod:`coordconv_patch.running.stale_traces`. The gate puts them back when the trace is over.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import _symbolic_trace

from coordconv_patch.errors import PatchError
from coordconv_patch.running.forks import after_fork, freed
from coordconv_patch.running.stale_traces import (
    Trace,
    is_tracing_here,
    mend,
    undo,
    was_begun_elsewhere,
)
from coordconv_patch.running.untouched import LOOK

__all__ = ["TracingBusyError", "tracing_alone"]

PATIENCE = 600.0
"""Seconds for which a trace or a compilation of another thread is waited for."""

_fx: Any = _symbolic_trace


class TracingBusyError(PatchError):
    """Another thread has been tracing for so long that it was not waited for any more."""


@contextlib.contextmanager
def tracing_alone() -> Iterator[None]:
    """No other thread traces or compiles meanwhile, and none notices that this one does.

    May be entered again by the thread that is in.

    Raises:
        TracingBusyError: If another thread, by code that is not ours, traces or compiles for
            longer than :data:`PATIENCE` seconds.
    """
    with LOOK:  # first: who has it may wait for the compiler's lock, not the other way round
        if _gate.tracer == threading.get_ident():
            yield
            return
        with _closed_gate():
            yield


@contextlib.contextmanager
def _closed_gate() -> Iterator[None]:
    """Wait until no other thread traces or compiles, and keep it so."""
    _gate.install()
    deadline = time.monotonic() + PATIENCE
    while True:
        # Each time anew: the trace that is waited for may need the compiler's lock to end.
        with _no_compilation(deadline):
            try:
                if _gate.close():
                    yield
                    return
            finally:
                _gate.open()
        if time.monotonic() > deadline:
            raise _busy()
        time.sleep(0.001)


@contextlib.contextmanager
def _no_compilation(deadline: float) -> Iterator[None]:
    """Hold the lock under which torch.compile compiles."""
    lock = _compile_lock()
    if lock is None:  # the compiler has not been imported, which is slow: nobody compiles
        yield
        return
    was_ours = lock._is_owned()
    has_it = False
    try:
        has_it = lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
        if not has_it:
            raise _busy()
        yield
    finally:
        # An interrupt may come when the lock is taken, and not yet noted to be.
        if has_it or (not was_ours and lock._is_owned()):
            lock.release()


def _compile_lock() -> Any:
    """The lock under which torch.compile compiles; ``None``: it was not imported."""
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", None)


def _busy() -> TracingBusyError:
    return TracingBusyError(
        f"another thread has been tracing or compiling a model for {PATIENCE:g} seconds, and two "
        "threads cannot do so at a time: try again when it has finished"
    )


class _Gate:
    """Stands before torch.fx's ``_new_patcher``, and may be closed for all threads but one.

    torch.fx calls that function to get the object that replaces things, and puts them back
    when its context is left.
    """

    def __init__(self) -> None:
        self.tracer: int | None = None
        """The thread that the gate is closed for: the one in :func:`tracing_alone`."""
        self._opened = threading.Condition()
        self._new_patcher: Any = None
        self._tracing: list[Trace] = []
        """Those of other code than ours."""

    def install(self) -> None:
        """Put the gate where it belongs, once; the thread that holds LOOK does so."""
        if self._new_patcher is None:
            self._new_patcher = getattr(_fx, "_new_patcher", None)
            if self._new_patcher is not None:  # else this torch leaves us the lock alone
                _fx._new_patcher = self._pass
            if hasattr(_fx, "_is_fx_tracing_flag"):  # may go with torch 2.13
                # In place: what torch.compile has compiled holds the function itself.
                _fx._is_tracing_here = is_tracing_here
                _fx.is_fx_tracing.__code__ = _is_fx_tracing.__code__
                if hasattr(_fx, "is_fx_symbolic_tracing"):
                    _fx.is_fx_symbolic_tracing.__code__ = _is_fx_symbolic_tracing.__code__

    def close(self) -> bool:
        """Close the gate for the running thread, unless other threads trace or wait to do so."""
        this = threading.get_ident()
        with self._opened:
            if not is_tracing_here():  # what an interrupt has left here of one that is over
                self._tracing = [each for each in self._tracing if each.thread not in (None, this)]
            if any(each.thread not in (None, this) for each in self._tracing):
                return False
            if was_begun_elsewhere():
                return False
            mend()
            self.tracer = this
            return True

    def open(self) -> None:
        """Let the others through, if the gate is closed for the running thread."""
        if self.tracer != threading.get_ident():
            return
        self.tracer = None  # first: an interrupt may come
        with self._opened:
            self._opened.notify_all()
        mend()

    @contextlib.contextmanager
    def _pass(self) -> Iterator[Any]:
        """What torch.fx calls instead of ``_new_patcher``."""
        trace = Trace()
        is_ours = self.tracer == trace.thread
        try:
            if not is_ours:
                with self._opened:
                    self._tracing.append(trace)
                    self._opened.wait_for(lambda: self.tracer is None)
            with self._replacing(trace) as patcher:
                yield patcher
        finally:
            trace.thread = None
            if not is_ours:
                with self._opened:
                    self._tracing = [each for each in self._tracing if each is not trace]

    @contextlib.contextmanager
    def _replacing(self, trace: Trace) -> Iterator[Any]:
        """The object that replaces things, and its replacements put back for certain."""
        mend(traces_here=1)
        prior, patcher = _fx.CURRENT_PATCHER, None
        try:
            with self._new_patcher() as patcher:
                yield _kept_to(trace, patcher)
        finally:
            trace.thread = None
            if patcher is not None:
                undo(patcher)
                if _fx.CURRENT_PATCHER is patcher:
                    _fx.CURRENT_PATCHER = prior

    def after_fork(self) -> None:
        """In a child: the threads that traced or waited in the parent are not here."""
        this = threading.get_ident()
        freed(self._opened)
        if self.tracer != this:
            self.tracer = None
        self._tracing = [each for each in self._tracing if each.thread == this]
        trace = getattr(getattr(_fx, "CURRENT_PATCHER", None), "_trace_behind_gate", None)
        if trace is not None and trace.thread != this:
            trace.thread = None
        mend()
        lock = _compile_lock()
        if lock is not None:  # ours may be the thread that held it
            freed(lock)


_gate = _Gate()
after_fork(_gate.after_fork)


def _is_fx_tracing() -> bool:
    """What ``torch.fx._symbolic_trace.is_fx_tracing`` becomes; the names are that module's."""
    return _is_fx_tracing_flag and _is_tracing_here()  # type: ignore[name-defined] # noqa: F821


def _is_fx_symbolic_tracing() -> bool:
    """The same for the function that newer versions than 2.6 ask before they run compiled code."""
    flag = _is_fx_tracing_flag  # type: ignore[name-defined] # noqa: F821
    is_here: bool = flag and _is_tracing_here()  # type: ignore[name-defined] # noqa: F821
    return is_here and not torch.compiler.is_compiling()


def _kept_to(trace: Trace, patcher: Any) -> Any:
    """The object that replaces things for torch.fx, made to do so for one thread only."""
    patch_method = trace.of(patcher).patch_method

    def patch_method_here(cls: type, name: str, new: Any, deduplicate: bool = True) -> None:
        patch_method(cls, name, _for_trace(trace, new, getattr(cls, name)), deduplicate)

    # Functions that it replaces in modules need none of this: they ask their arguments.
    patcher.patch_method = patch_method_here
    return patcher


def _for_trace(
    trace: Trace, replacement: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that is ``replacement`` in a trace's thread, and ``original`` in every other."""

    @functools.wraps(original)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        function = replacement if threading.get_ident() == trace.thread else original
        return function(*args, **kwargs)

    # Another thread may have begun this call, or taken it for the model's, when it may compile
    # again: torch.compile is to compile what is called here, not this.
    skip = getattr(sys.modules.get("torch._dynamo.decorators"), "skip", None)
    return chosen if skip is None else skip(chosen)
