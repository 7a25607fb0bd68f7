"""Progress: a bar on a terminal, and a line in the log now and then where there is none.

How long the rest takes is estimated only where one step is like another.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

from tqdm.auto import tqdm

__all__ = ["Progress", "progress_over"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_FIRST_LINE, _NEXT_LINES = 5.0, 30.0
"""Seconds until the first line in the log, and between the others."""

_UNLIKE = "{desc}: {n_fmt} of {total_fmt}{unit} |{bar}| {elapsed}{postfix}"
_ENDLESS = "{desc}: {n_fmt}{unit}, {elapsed}{postfix}"


class Progress:
    """Steps of some work, to be used in a ``with`` statement.

    Args:
        description: What is being done.
        total: Number of steps; ``None`` if unknown.
        unit: What a step is, in the plural; may be empty.
        alike: Whether one step takes as long as another, so that the rest can be estimated.
        delay: Seconds before a bar appears.
        stays: Whether the bar stays when the work is done.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        unit: str = "",
        alike: bool = False,
        delay: float = 1.0,
        stays: bool = False,
    ) -> None:
        self._description, self._total, self._unit, self._alike = description, total, unit, alike
        self.done = 0
        """Steps done so far."""
        self._started = time.monotonic()
        self._next_line = self._started + _FIRST_LINE
        form = _ENDLESS if total is None else None if alike else _UNLIKE
        self._bar: Any = tqdm(
            desc=description,
            total=total,
            unit=f" {unit}" if unit else "",
            delay=delay,
            leave=stays,
            bar_format=form,
            disable=False if "ipykernel" in sys.modules else None,  # None: unless on a terminal
        )

    def step(self, count: int = 1) -> None:
        """So many steps are done."""
        self.done += count
        self._bar.update(count)
        self._tell()

    def describe(self, description: str) -> None:
        """What is being done now."""
        self._description = description
        self._bar.set_description_str(description)  # the other adds a colon of its own
        self._tell()

    def note(self, text: str) -> None:
        """Figures to show behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def _tell(self) -> None:
        """A line in the log, where no bar is seen and some time has passed."""
        now = time.monotonic()
        if not self._bar.disable or now < self._next_line:
            return
        self._next_line = now + _NEXT_LINES
        spent = now - self._started
        of_total = "" if self._total is None else f" of {self._total}"
        unit = f" {self._unit}" if self._unit else ""
        text = f"{self._description}: {self.done}{of_total}{unit} in {spent:.0f} s"
        if self._alike and self._total and self.done:
            rest = spent / self.done * (self._total - self.done)
            text += f", some {rest:.0f} s to go"
        _LOG.info("%s", text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


def progress_over(
    steps: Iterable[T],
    description: str,
    *,
    unit: str = "",
    alike: bool = False,
    total: int | None = None,
    stays: bool = False,
) -> Iterator[T]:
    """The steps one by one, with progress shown; see :class:`Progress`."""
    if total is None and isinstance(steps, Sized):
        total = len(steps)
    with Progress(description, total, unit=unit, alike=alike, stays=stays) as progress:
        for step in steps:
            yield step
            progress.step()
