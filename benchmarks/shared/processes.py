"""Measuring in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from shared.record import median_session

__all__ = ["in_fresh_process", "median_process"]


def in_fresh_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function where no other model lives: their memory and garbage count for nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def median_process(measure: Callable[..., Any], *arguments: Any, processes: int) -> dict[str, Any]:
    """Measure in fresh processes, and take the medians, as :func:`median_session`."""
    return median_session([in_fresh_process(measure, *arguments) for _ in range(processes)])
