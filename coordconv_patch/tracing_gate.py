"""Let one thread at a time trace with torch.fx, and keep its tracing away from the others.

While torch.fx traces, it replaces ``nn.Module.__call__`` and ``nn.Module.__getattr__`` for the
whole process. A forward pass of any model in any other thread then runs into a tracer that
does not know it, and two tracers that overlap put back each other's replacements, so that
``nn.Module.__call__`` stays broken for good. torch.export traces in the same way.

While :func:`tracing_alone` is entered, its thread passes a gate in the place of the function
with which torch.fx begins its replacements (``torch.fx._symbolic_trace._new_patcher``):

- in the thread that is in, each replacement is made to ask for the thread: all other threads
  run the original;
- other threads that begin a trace of their own, by torch.compile or torch.export perhaps, wait
  at the gate until the thread is out; and one that traces already is waited for before.

What is left: two traces of *other* code overlap as ever, because outside of
:func:`tracing_alone` nothing of torch is changed. And in torch versions that keep a flag "is
tracing" for the whole process, not for each thread, a model compiled by torch.compile that runs
in another thread at that moment may raise (2.14 does not).
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

import torch
from torch import fx
from torch.fx import _symbolic_trace

from coordconv_patch.errors import PatchError
from coordconv_patch.modes import LOOK

__all__ = ["TracingBusyError", "tracing_alone"]

PATIENCE = 60.0
"""Seconds for which a trace of another thread is waited for."""

_fx: Any = _symbolic_trace
_inside = False
"""Whether a thread is in :func:`tracing_alone`; read and written by the thread that holds LOOK."""


class TracingBusyError(PatchError):
    """Another thread has been tracing for so long that it was not waited for any more."""


@contextlib.contextmanager
def tracing_alone(*, compiling: bool = False) -> Iterator[None]:
    """No other thread traces meanwhile, and none notices that this one does.

    May be entered again by the thread that is in.

    Args:
        compiling: This thread may call torch's compiler, as torch.export does. The threads that
            compile wait as well, since they would trace while they hold the compiler's lock.

    Raises:
        TracingBusyError: If another thread, by code that is not ours, traces for longer than
            :data:`PATIENCE` seconds.
    """
    with LOOK:
        is_in_already = _inside  # this thread, or it would not have got the lock
    if is_in_already:
        yield
        return
    with _alone(compiling):
        yield


@contextlib.contextmanager
def _alone(compiling: bool) -> Iterator[None]:
    global _inside
    deadline = time.monotonic() + PATIENCE
    while True:
        # All or nothing: a thread that waits for a trace must not hold what that trace needs.
        with contextlib.ExitStack() as stack:
            if compiling:
                stack.enter_context(_compile_lock())
            stack.enter_context(LOOK)
            gate = stack.enter_context(_Gate())
            if not gate.must_wait():
                _inside = True
                try:
                    yield
                finally:
                    _inside = False
                return
        if time.monotonic() > deadline:
            raise TracingBusyError(
                f"another thread has been tracing a model with torch.fx or torch.export for "
                f"{PATIENCE:g} seconds, and two threads cannot trace at a time: try again when it "
                "has finished"
            )
        time.sleep(0.001)


def _compile_lock() -> contextlib.AbstractContextManager[Any]:
    from torch._dynamo.convert_frame import compile_lock  # slow to import

    return compile_lock


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
    revert, reapply = patcher.revert_all_patches, patcher.reapply_all_patches

    def patch_here(names: dict[str, Any], name: str, new: Any, deduplicate: bool = True) -> None:
        original = names[name] if name in names else getattr(builtins, name)
        patch(names, name, _for_thread(thread, new, original), deduplicate)

    def patch_method_here(cls: type, name: str, new: Any, deduplicate: bool = True) -> None:
        patch_method(cls, name, _for_thread(thread, new, getattr(cls, name)), deduplicate)

    def if_here(undo: Callable[[], Any]) -> Callable[[], Any]:
        # torch.compile takes replacements back for the time of a compilation, in any thread.
        return lambda: undo() if threading.get_ident() == thread else patcher.patches_made

    patcher.patch = patch_here
    patcher.patch_method = patch_method_here
    patcher.revert_all_patches = if_here(revert)
    patcher.reapply_all_patches = if_here(reapply)


def _for_thread(
    thread: int, replacement: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that is ``replacement`` in one thread, and ``original`` in every other."""

    @functools.wraps(original)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        # Where torch.compile reads this line in another thread, it must not come to the second
        # question, which it cannot answer.
        if torch.compiler.is_dynamo_compiling() or threading.get_ident() != thread:
            return original(*args, **kwargs)
        return replacement(*args, **kwargs)

    return chosen


def _is_tracing_here() -> bool:
    """Whether the running thread is in a trace of torch.fx, begun by whomever."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
        frame = frame.f_back  # type: ignore[assignment]  # the loop ends at None
    return frame is not None
