"""Run the checks of many models, each in a process of its own with a time limit.

    python tests/zoo/sweep.py                         # what docs/zoo_results.json lacks
    python tests/zoo/sweep.py --stage torch --again   # one stage, afresh
    python tests/zoo/sweep.py 'timm/*' 'smp/Unet'     # names or globs

Rows are kept one by one, so an interrupted sweep goes on where it stopped; report.py
gathers them into docs/zoo_results.json.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the processes that it starts find the package by PYTHONPATH
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm.auto import tqdm

from zoo.catalogue import CATALOGUE
from zoo.results import STAGES, Stage, checked_in, judge, load, store, versions_here

__all__ = ["TIME_LIMITS", "row_of"]

TIME_LIMITS: dict[Stage, float] = {"torch": 240.0, "onnx": 400.0}
"""Seconds a model."""

_PRELOADED = ["torch", "timm", "torchvision", "onnxscript", "onnxruntime"]
"""Imported once; the processes of the models are forked from there."""

_context_lock = threading.Lock()


def row_of(name: str, stage: Stage) -> dict[str, Any]:
    """Check one entry in a process of its own; the row is kept, too."""
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, stage, sender), daemon=True)
    process.start()
    sender.close()
    limit = TIME_LIMITS[stage]
    row: dict[str, Any]
    try:
        if receiver.poll(limit):
            row = receiver.recv()
        else:
            row = {"error": f"took longer than {limit:.0f} seconds"}
    except EOFError:
        process.join()
        row = {"error": f"the process died with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    row["versions"] = versions_here()
    store(name, stage, row)
    return row


def _context() -> Any:
    with _context_lock:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        return context


def _child(name: str, stage: Stage, sender: Any) -> None:
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        if stage == "torch":
            from zoo.torch_stage import check_in_torch

            row = check_in_torch(CATALOGUE[name])
        else:
            from zoo.onnx_stage import check_in_onnx

            row = check_in_onnx(CATALOGUE[name])
    except BaseException as error:  # the parent waits for a row, whatever happens
        row = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    sender.send(row)
    sender.close()


def _run(jobs: Sequence[tuple[str, Stage]], workers: int) -> int:
    failed = 0
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(jobs), unit=" models", smoothing=0.05) as progress,
    ):
        running = {pool.submit(row_of, *job): job for job in jobs}
        for future in as_completed(running):
            name, stage = running[future]
            verdict, problems = judge(stage, future.result())
            progress.update()
            if verdict != "passes":
                progress.write(f"{stage} {name}: {verdict}: {'; '.join(problems)[:300]}")
            failed += verdict == "fails"
    return failed


def _without_row(jobs: Sequence[tuple[str, Stage]]) -> list[tuple[str, Stage]]:
    """Those that have neither a working row nor one that is checked in."""
    done = checked_in()
    return [
        (name, stage)
        for name, stage in jobs
        if (name, stage) not in done and load(name, stage) is None
    ]


def main() -> int:
    """The command line; returns how many models fail by our fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["*"], help="entries, or globs")
    parser.add_argument("--stage", choices=STAGES, help="one stage only")
    parser.add_argument("--again", action="store_true", help="also what was run already")
    parser.add_argument("--limit", type=float, help="seconds a model, on a slow machine")
    parser.add_argument("--workers", type=int, default=1, help="models at a time")
    options = parser.parse_args()
    names = [n for n in CATALOGUE if any(fnmatch.fnmatch(n, glob) for glob in options.names)]
    if not names:
        parser.error(f"no entry is called {options.names}")
    stages = [options.stage] if options.stage else STAGES
    jobs = [(name, stage) for stage in stages for name in names]
    if not options.again:
        jobs = _without_row(jobs)
    if options.limit is not None:
        TIME_LIMITS.update(dict.fromkeys(STAGES, options.limit))
    return min(_run(jobs, options.workers), 99)


if __name__ == "__main__":
    sys.exit(main())
