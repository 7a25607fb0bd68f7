"""Work that another thread is in the middle of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn


class Halting(nn.Module):
    """Its forward halts, so that a trace of it lasts until :attr:`leave` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.leave = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.begun.set()
        assert self.leave.wait(60)
        return x + 1


@contextmanager
def another_thread(enter: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """A context that another thread is in."""
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with enter():
            entered.set()
            assert leave.wait(60)

    thread = threading.Thread(target=stay)
    thread.start()
    assert entered.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join()
