"""A child process works, whatever other threads were doing when it was forked."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from other_threads import Halting, another_thread
from thread_trials import pictures, plain_net, trained
from torch import fx, nn
from torch.fx import _symbolic_trace

import coordconv_patch as ccp
from coordconv_patch.layers import places
from coordconv_patch.layers.coordinates import _cached_grid
from coordconv_patch.running import forks, silence, tracing_gate
from coordconv_patch.running.tracing_gate import tracing_alone
from coordconv_patch.running.untouched import LOOK

MODULE_CALL = nn.Module.__call__

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def in_child(work: Callable[[], object], seconds: float = 30.0) -> int | None:
    """The exit code of a child process that does some work; ``None``: it hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@contextmanager
def tracing() -> Iterator[None]:
    """A trace of torch.fx is in the middle of a forward."""
    halting = Halting()
    thread = threading.Thread(target=fx.symbolic_trace, args=(halting,))
    thread.start()
    assert halting.begun.wait(60)
    try:
        yield
    finally:
        halting.leave.set()
        thread.join()


def work() -> None:
    assert _symbolic_trace.CURRENT_PATCHER is None
    assert nn.Module.__call__ is MODULE_CALL
    net, (x,) = plain_net(), pictures(16)
    patched = trained(ccp.patch(net, "all", example_inputs=x))
    with ccp.places(patched, ccp.Window((0, 0), (16, 17), (32, 34))):
        patched(x)
    assert len(fx.symbolic_trace(net).graph.nodes) == 9
    thread = threading.Thread(target=lambda: net(x))  # may get the number of one that was
    thread.start()
    thread.join()
    _cached_grid.cache_clear()
    print("printed")


HELD: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "a look": lambda: LOOK,
    "a trace of ours": tracing_alone,
    "a trace": tracing,
    "silence": silence.output_silenced,
    "silent descriptors": silence.descriptors_silenced,
    "sharing": lambda: places._sharing,
    "grids": lambda: _cached_grid._lock,
}


@pytest.mark.parametrize("held", HELD)
def test_a_child_works_while_another_thread_holds(
    held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work()  # so that everything is imported and installed
    monkeypatch.setattr(tracing_gate, "PATIENCE", 5.0)
    with another_thread(HELD[held]):
        assert in_child(work) == 0


def test_a_child_prints_and_warns_while_another_thread_is_silent(
    capfd: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def silent() -> Iterator[None]:
        with silence.descriptors_silenced(), silence.warnings_ignored():
            yield

    def speak() -> None:
        assert not isinstance(sys.stdout, silence._AudibleStream)
        assert not any(isinstance(entry[1], silence._ThisThread) for entry in warnings.filters)
        print("printed", flush=True)
        os.write(2, b"written")

    with another_thread(silent):
        assert in_child(speak) == 0
    assert capfd.readouterr() == ("printed\n", "written")


def test_the_thread_that_forks_keeps_what_it_holds(capfd: pytest.CaptureFixture[str]) -> None:
    def held() -> None:
        assert LOOK._is_owned()
        assert tracing_gate._gate.tracer == threading.get_ident()
        os.write(1, b"not heard")

    with LOOK, silence.descriptors_silenced(), tracing_alone():
        assert in_child(held) == 0
    assert capfd.readouterr().out == ""
    with silence.output_silenced():
        if os.fork() == 0:
            print("not heard")
            os._exit(isinstance(sys.stdout, silence._AudibleStream))
        _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 1


def test_a_condition_is_freed_without_those_that_waited() -> None:
    condition = threading.Condition()

    @contextmanager
    def waiting() -> Iterator[None]:
        with condition:
            yield

    def use() -> None:
        forks.freed(condition)
        with condition:
            condition.notify_all()

    with another_thread(waiting):
        assert in_child(use) == 0
