"""An interrupt (Ctrl-C) at a bad moment leaves nothing behind that stops later work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from other_threads import Halting
from thread_trials import pictures, plain_net
from torch import fx, nn
from torch.fx import _symbolic_trace

import coordconv_patch as ccp
from coordconv_patch.graphs.conv_tracer import trace
from coordconv_patch.running import stale_traces, tracing_gate
from coordconv_patch.running.tracing_gate import tracing_alone

_fx: Any = _symbolic_trace
REVERT = _fx._Patcher.revert_all_patches
REPLACED = (nn.Module.__call__, nn.Module.__getattr__)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing_gate, "PATIENCE", 5.0)
        yield
    assert (nn.Module.__call__, nn.Module.__getattr__) == REPLACED
    assert _fx.CURRENT_PATCHER is None
    assert (tracing_gate._gate.tracer, tracing_gate._gate._tracing) == (None, [])


def _everything_works() -> None:
    (x,) = pictures(16)
    net = plain_net()
    assert torch.equal(ccp.patch(net, "all", example_inputs=x)(x), net(x))
    assert len(fx.symbolic_trace(net).graph.nodes) == len(trace(net).nodes)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: len(ccp.plan(net, "all").rows)).result() == 3


def _interrupted_after(patcher: Any) -> None:
    REVERT(patcher)
    raise KeyboardInterrupt


def _interrupted_before(patcher: Any) -> None:
    raise KeyboardInterrupt


def _interrupted_in_between(patcher: Any) -> None:
    patcher.patches_made[0].revert()
    raise KeyboardInterrupt


@pytest.mark.parametrize("traces", [trace, fx.symbolic_trace, lambda net: ccp.patch(net, "all")])
@pytest.mark.parametrize(
    "revert", [_interrupted_after, _interrupted_before, _interrupted_in_between]
)
def test_while_a_trace_puts_things_back(
    revert: Callable[[Any], None],
    traces: Callable[[nn.Module], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace(plain_net())  # so that the gate is there
    monkeypatch.setattr(_fx._Patcher, "revert_all_patches", revert)
    with pytest.raises(KeyboardInterrupt):
        traces(plain_net())
    monkeypatch.undo()
    assert (nn.Module.__call__, nn.Module.__getattr__) == REPLACED
    _everything_works()


def test_before_the_gate_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace without the gate: nobody puts back what it leaves, until we trace."""
    gate = tracing_gate._gate
    if gate._new_patcher is not None:
        monkeypatch.setattr(_fx, "_new_patcher", gate._new_patcher)
    monkeypatch.setattr(_fx._Patcher, "revert_all_patches", _interrupted_before)
    with pytest.raises(KeyboardInterrupt):
        fx.symbolic_trace(plain_net())
    monkeypatch.undo()
    assert nn.Module.__call__ is not REPLACED[0]
    _everything_works()


@pytest.mark.parametrize("moment", ["undo", "mend"])
def test_while_the_gate_itself_puts_things_back(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    trace(plain_net())
    monkeypatch.setattr(_fx._Patcher, "revert_all_patches", _interrupted_before)
    monkeypatch.setattr(tracing_gate, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trace(plain_net())
    monkeypatch.undo()
    (x,) = pictures(16)
    plain_net()(x)  # whatever is replaced runs the original: the trace is over
    _everything_works()


def test_while_the_gate_is_closed_or_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = tracing_gate._gate
    for moment in ("close", "open"):
        plain = getattr(gate, moment)

        def interrupted(plain: Callable[[], Any] = plain) -> None:
            plain()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(gate, moment, interrupted)
            with pytest.raises(KeyboardInterrupt), tracing_alone():
                pass
        _everything_works()


def test_while_a_trace_waits_at_the_gate() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with tracing_alone():
            inside.set()
            assert leave.wait(60)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        holding = pool.submit(hold)
        assert inside.wait(60)
        patch.setattr(tracing_gate._gate._opened, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fx.symbolic_trace(plain_net())
        leave.set()
        holding.result()
    _everything_works()


def test_a_trace_that_runs_is_not_taken_for_one_that_is_over() -> None:
    halting = Halting()
    with ThreadPoolExecutor(1) as pool:
        traced = pool.submit(fx.symbolic_trace, halting)
        assert halting.begun.wait(60)
        patcher = _fx.CURRENT_PATCHER
        stale_traces.mend()
        assert _fx.CURRENT_PATCHER is patcher
        if hasattr(patcher, "_trace_behind_gate"):
            del patcher._trace_behind_gate  # as if it had been begun before the gate was there
        assert stale_traces.was_begun_elsewhere()
        stale_traces.mend()
        assert _fx.CURRENT_PATCHER is patcher
        halting.leave.set()
        assert len(traced.result().graph.nodes) == 3
