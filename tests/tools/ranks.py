"""Two processes that run functions as the ranks of a gloo process group, with a time limit."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2
LIMIT = 60.0
"""Seconds that one function may take; then both processes are ended and the test fails."""
_PATIENCE = 5.0
"""Seconds that a process has to end by itself."""
_GLOO_TIMEOUT = datetime.timedelta(seconds=20)


class Ranks:
    """Processes are started by the first function and kept for the next: starting takes seconds."""

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(rank, *args)`` returns on each rank, in order of ranks.

        Args:
            function: A module-level function; it finds the process group initialised.
            *args: Anything that pickles.
        """
        if not self._workers:
            self._workers = [_start(rank) for rank in range(RANKS)]
        with tempfile.TemporaryDirectory() as folder:
            for _, connection in self._workers:
                connection.send((function, args, str(Path(folder, "store"))))
            outcomes = [
                _outcome(rank, connection) for rank, (_, connection) in enumerate(self._workers)
            ]
        failures = [text for text, _ in outcomes if text]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [result for _, result in outcomes]

    def stop(self) -> None:
        """End the processes; the next function starts new ones."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(_PATIENCE)
            process.kill()
            process.join()
        self._workers = []


def _outcome(rank: int, connection: Connection) -> tuple[str, Any]:
    if not connection.poll(LIMIT):
        return f"rank {rank} did not finish within {LIMIT:.0f} s", None
    try:
        return connection.recv()
    except EOFError:
        return f"rank {rank} died", None


def _start(rank: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, args, store = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=RANKS,
                timeout=_GLOO_TIMEOUT,
            )
            result = function(rank, *args)
            dist.barrier()  # nobody tears the group down while another still needs it
            dist.destroy_process_group()
            connection.send(("", result))
        except Exception:
            connection.send((f"rank {rank}:\n{traceback.format_exc()}", None))
            return
