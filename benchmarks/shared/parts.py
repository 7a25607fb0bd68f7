"""Parts of a benchmark that has little time: what fails or no longer fits is said, not hidden."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from shared.record import Record

__all__ = ["Part", "TimeLeft", "measure_parts", "reason_not_run"]

_LONGEST_REASON = 300


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        key: Its key in the record.
        seconds: What it takes, about, on a machine with a data-centre GPU.
        run: Measures it.
    """

    key: str
    seconds: float
    run: Callable[[], dict[str, Any]]


class TimeIsUp(BaseException):
    """Raised within a part at the end of all time; no ``except Exception`` takes it for its own."""


class TimeLeft:
    """How much time there is until all must be done.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __call__(self) -> float:
        """Seconds left; never below 0."""
        return max(0.0, self._end - time.monotonic())

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """While entered, the end interrupts the code with a :class:`TimeIsUp`."""
        in_main = threading.current_thread() is threading.main_thread()
        if not hasattr(signal, "SIGALRM") or not in_main:
            yield
            return
        before = signal.signal(signal.SIGALRM, _raise_time_is_up)
        signal.setitimer(signal.ITIMER_REAL, max(self(), 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _raise_time_is_up(number: int, frame: Any) -> None:
    raise TimeIsUp


def measure_parts(record: Record, parts: list[Part], left: TimeLeft) -> None:
    """Measure the parts in order, those that were not run before once more."""
    for part in parts:
        if reason_not_run(record.results.get(part.key, {})):
            del record.results[part.key]
        record.measure(part.key, _attempt, part, left)


def reason_not_run(result: Mapping[str, Any]) -> str:
    """Why a part was not run; ``""`` if it was."""
    return str(result.get("not_run", ""))


def _attempt(part: Part, left: TimeLeft) -> dict[str, Any]:
    seconds = left()
    if seconds < part.seconds:
        return {"not_run": f"{seconds:.0f} s were left, and it takes about {part.seconds:.0f} s"}
    try:
        with left.enforced():
            return part.run()
    except TimeIsUp:
        return {"not_run": f"it was not done in the {seconds:.0f} s that were left"}
    except Exception as error:
        said = " ".join(str(error).split())[:_LONGEST_REASON]
        return {"not_run": f"{type(error).__name__}: {said}"}
    finally:
        if torch.cuda.is_available():  # the next part needs the memory
            gc.collect()
            torch.cuda.empty_cache()
