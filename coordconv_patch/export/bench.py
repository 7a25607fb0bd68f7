"""What coordinates cost in ONNX Runtime: plain and patched side by side, in one run.

The variants run alternately, and the figure is the ratio of their medians to the
plain model's: absolute times drift on any machine, ratios of one run do not.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from coordconv_patch.branch import CoordBranch
from coordconv_patch.export.onnx import export_onnx
from coordconv_patch.export.providers import make_session, working_providers
from coordconv_patch.export.verify import tensors_in
from coordconv_patch.layers import coord_layers
from coordconv_patch.patching import unpatch

__all__ = ["BenchReport", "BenchRow", "bench_onnx"]


@dataclass(frozen=True)
class BenchRow:
    """One variant of the model.

    Attributes:
        name: ``"plain"``, or the lowering; ``"channels"`` is the concatenating CoordConv.
        seconds: Median time of one run.
        ratio: Its median over the plain model's.
        file_size: Bytes of its ONNX file.
    """

    name: str
    seconds: float
    ratio: float
    file_size: int


@dataclass(frozen=True)
class BenchReport:
    """What :func:`bench_onnx` measured.

    Attributes:
        rows: The variants, the plain model first.
        provider: The execution provider that ran them.
        threads: Threads within an operator; 0: ONNX Runtime's choice.
        repeats: Timed runs of each variant.
        sites: Number of patched sites.
    """

    rows: tuple[BenchRow, ...]
    provider: str
    threads: int
    repeats: int
    sites: int

    def table(self) -> Table:
        """The report as a rich table."""
        threads = f"{self.threads} threads" if self.threads else "default threads"
        table = Table(
            title=f"{self.provider}, {threads}, {self.sites} patched sites, "
            f"medians of {self.repeats} alternating runs",
            title_justify="left",
        )
        table.add_column("variant")
        for heading in ("median ms", "ratio to plain", "file MB"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                row.name,
                f"{row.seconds * 1e3:.3f}",
                f"{row.ratio:.3f}",
                f"{row.file_size / 1e6:.2f}",
            )
        return table


def _lowerings_of(model: nn.Module) -> tuple[str, ...]:
    functional = any(isinstance(layer, CoordBranch) for layer in coord_layers(model).values())
    return ("map", "branch") if functional else ("channels", "map", "branch")


def bench_onnx(
    model: nn.Module,
    example_inputs: Any,
    *,
    lowerings: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    threads: int = 0,
    repeats: int = 30,
) -> BenchReport:
    """Time a patched model in each lowering against the plain model, in ONNX Runtime.

    Args:
        model: A patched model.
        example_inputs: The inputs to run on; they set batch and image size.
        lowerings: The forms to time, see :mod:`coordconv_patch.passes.lower`; ``None``: all
            with coordinates of one size that the model can take.
        providers: Execution providers; ``None``: those that work here.
        threads: Threads within an operator; 0: ONNX Runtime's choice.
        repeats: Timed runs of each variant.

    Raises:
        PatchError: If the model is not patched.
        ExportError: If a variant cannot be exported.
    """
    working = working_providers(providers)
    plain = unpatch(model, discard=True)
    variants: dict[str, tuple[nn.Module, str]] = {"plain": (plain, "auto")}
    variants |= {lowering: (model, lowering) for lowering in lowerings or _lowerings_of(model)}
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors_in(example_inputs)]
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable[[], Any]] = {}
        sizes: dict[str, int] = {}
        for name, (variant, lowering) in tqdm(variants.items(), desc="exporting", disable=None):
            report = export_onnx(
                variant,
                Path(folder) / f"{name}.onnx",
                example_inputs,
                lowering=lowering,
                dynamic_batch=_batched(example_inputs),
                providers=working,
            )
            sizes[name] = report.file_size
            session = make_session(report.path, working, threads=threads)
            feeds = {
                value.name: array for value, array in zip(session.get_inputs(), arrays, strict=True)
            }
            runs[name] = functools.partial(session.run, None, feeds)
        medians = alternating_medians(runs, repeats)
    rows = tuple(
        BenchRow(name, medians[name], medians[name] / medians["plain"], sizes[name])
        for name in variants
    )
    return BenchReport(rows, working[0], threads, repeats, len(coord_layers(model)))


def _batched(example_inputs: Any) -> bool:
    return isinstance(example_inputs, torch.Tensor)


def alternating_medians(
    runs: dict[str, Callable[[], Any]], repeats: int, *, warm_up: int = 3
) -> dict[str, float]:
    """Median seconds of each action; the actions take turns, so that drift hits all alike."""
    for _ in range(warm_up):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc="timing", disable=None, leave=False):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
