"""Let one thread at a time trace with torch.fx, and keep its tracing away from the others.

While torch.fx traces, it replaces ``nn.Module.__call__`` and ``nn.Module.__getattr__`` for the
whole process. A forward pass of any model in any other thread then runs into a tracer that
does not know it, and two tracers that overlap put back each other's replacements, so that
``nn.Module.__call__`` stays broken for good. torch.export traces in the same way.

While :func:`tracing_alone` is entered, its thread passes a gate in the place of the function
with which torch.fx begins its replacements (``torch.fx._symbolic_trace._new_patcher``):

- in the thread that is in, each replacement is made to ask for the thread: all other threads
  run the original;
- other threads that begin a trace of their own, by torch.export perhaps, wait at the gate until
  the thread is out; one that traces already is waited for before;
- no other thread compiles: torch.compile would read the replacements, and note them down.

What is left: two traces of *other* code overlap as ever, because outside of
:func:`tracing_alone` nothing of torch is changed. torch.export itself changes more of the
process for as long as it runs, whoever calls it: other threads' convolutions are computed
without oneDNN (other last bits), and a model that torch.compile has compiled may raise a
KeyError there. And in torch versions that keep the flag "is tracing" for the whole process, not
for each thread (2.6 does, 2.14 does not), a compiled model that another thread calls at that
moment raises.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx
from torch.fx import _symbolic_trace

from coordconv_patch.errors import PatchError
from coordconv_patch.modes import LOOK

__all__ = ["TracingBusyError", "tracing_alone"]

PATIENCE = 600.0
"""Seconds for which a trace or a compilation of another thread is waited for."""

_fx: Any = _symbolic_trace
_inside = False
"""Whether a thread is in :func:`tracing_alone`; only the thread that holds LOOK asks."""


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
    global _inside
    with contextlib.ExitStack() as stack:
        stack.enter_context(LOOK)  # first: whoever has it may wait for the compiler, not vice versa
        if not _inside:  # or it is this thread that is in, since it has the lock
            stack.enter_context(_gate_closed())
            _inside = True
            stack.callback(_leave)
        yield


def _leave() -> None:
    global _inside
    _inside = False


@contextlib.contextmanager
def _gate_closed() -> Iterator[None]:
    """Wait until no other thread traces or compiles, and keep it so."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with _no_compilation(deadline), _Gate() as gate:
            if not gate.must_wait():
                yield
                return
        # Without the compiler, which the other thread's trace may need.
        if time.monotonic() > deadline:
            raise _busy()
        time.sleep(0.001)


@contextlib.contextmanager
def _no_compilation(deadline: float) -> Iterator[None]:
    """Hold the lock under which torch.compile compiles."""
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    lock = getattr(convert_frame, "compile_lock", None)
    if lock is None:  # the compiler has not been imported, which is slow: nobody compiles
        yield
        return
    if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise _busy()
    try:
        yield
    finally:
        lock.release()


def _busy() -> TracingBusyError:
    return TracingBusyError(
        f"another thread has been tracing or compiling a model for {PATIENCE:g} seconds, and two "
        "threads cannot do so at a time: try again when it has finished"
    )


class _Gate:
    """Stands in the place of torch.fx's ``_new_patcher`` while entered.

    torch.fx calls that function to get the object that replaces things, and puts them back
    when its context is left.
    """

    _arrivals = threading.Lock()
    _waiting = 0
    """Threads that wait at a gate, or have just come through."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.opened = threading.Event()

    def __enter__(self) -> _Gate:
        self.new_patcher = _fx._new_patcher
        _fx._new_patcher = self.patcher
        return self

    def __exit__(self, *exception: object) -> None:
        _fx._new_patcher = self.new_patcher
        self.opened.set()

    def must_wait(self) -> bool:
        """Whether another thread traces, or has waited for longer than this one."""
        is_traced_elsewhere = _fx.CURRENT_PATCHER is not None and not _is_tracing_here()
        return is_traced_elsewhere or _Gate._waiting > 0

    @contextlib.contextmanager
    def patcher(self) -> Iterator[Any]:
        """What torch.fx calls instead of ``_new_patcher``."""
        if threading.get_ident() == self.thread:
            with self.new_patcher() as patcher:
                _keep_to_thread(patcher, self.thread)
                yield patcher
            return
        with contextlib.ExitStack() as stack:
            with _Gate._arrival():
                self.opened.wait()
                patcher = stack.enter_context(_fx._new_patcher())
            yield patcher

    @classmethod
    @contextlib.contextmanager
    def _arrival(cls) -> Iterator[None]:
        with cls._arrivals:
            cls._waiting += 1
        try:
            yield
        finally:
            with cls._arrivals:
                cls._waiting -= 1


def _keep_to_thread(patcher: Any, thread: int) -> None:
    """Make the object that replaces things for torch.fx do so for one thread only."""
    patch, patch_method = patcher.patch, patcher.patch_method

    def patch_here(names: dict[str, Any], name: str, new: Any, deduplicate: bool = True) -> None:
        original = names[name] if name in names else getattr(builtins, name)
        patch(names, name, _for_thread(thread, new, original), deduplicate)

    def patch_method_here(cls: type, name: str, new: Any, deduplicate: bool = True) -> None:
        patch_method(cls, name, _for_thread(thread, new, getattr(cls, name)), deduplicate)

    patcher.patch = patch_here
    patcher.patch_method = patch_method_here


def _for_thread(
    thread: int, replacement: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that is ``replacement`` in one thread, and ``original`` in every other."""

    @functools.wraps(original)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        function = replacement if threading.get_ident() == thread else original
        return function(*args, **kwargs)

    return chosen


def _is_tracing_here() -> bool:
    """Whether the running thread is in a trace of torch.fx, begun by whomever."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
        frame = frame.f_back  # type: ignore[assignment]  # the loop ends at None
    return frame is not None
