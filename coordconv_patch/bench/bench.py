"""What coordinates cost in ONNX Runtime: plain, patched and naive side by side, in one run.

The variants take turns, see :mod:`coordconv_patch.runtime.timing`. Among them is the
plain model a second time: how far its ratio is from 1 is what this machine adds to
every other ratio.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coordconv_patch.bench.machine import describe_machine
from coordconv_patch.bench.naive import export_naive
from coordconv_patch.bench.report import (
    NAIVE,
    PLAIN,
    PLAIN_AGAIN,
    BenchGroup,
    BenchReport,
    BenchRow,
)
from coordconv_patch.display.progress import Progress
from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.export.auto_lowering import accepted_lowerings
from coordconv_patch.export.axes import batch_size
from coordconv_patch.export.onnx import export_onnx
from coordconv_patch.files.atomic import os_errors_reported
from coordconv_patch.graphs.programs import require_coord_layers
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.patching.unpatch import unpatch
from coordconv_patch.running.inputs import tensors_in
from coordconv_patch.runtime.binding import BoundRun
from coordconv_patch.runtime.providers import CPU, make_session, working_providers
from coordconv_patch.runtime.timing import alternate, median, ratio_of_medians

__all__ = ["bench_onnx"]

_GPU_TOLERANCE = 2e-2
"""Relative to the largest output: GPUs compute convolutions in TF32, with 10 bits of mantissa."""


def bench_onnx(
    model: nn.Module,
    example_inputs: Any,
    *,
    lowerings: Sequence[str] | None = None,
    naive: bool = True,
    providers: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    threads: Sequence[int] = (0,),
    repeats: int = 30,
) -> BenchReport:
    """Time a patched model in each lowering, and the naive form, against the plain model.

    Every file is compared with torch before it is timed. On GPUs inputs and outputs stay on
    the device, so that no copy is timed.

    Args:
        model: A patched model.
        example_inputs: The inputs to run on. A tensor's batch can be changed by
            ``batches``; anything else runs at its own batch size, which the files then fix.
        lowerings: The forms to time, as ``export_onnx`` takes them; ``None``: all that the
            model can take.
        naive: Whether to time the concatenating CoordConv too, see
            :mod:`coordconv_patch.bench.naive`.
        providers: Execution providers, each timed on its own; ``None``: all that work here.
        batches: Batch sizes; ``None``: that of the example.
        threads: Threads within an operator, for the CPU's provider; 0: ONNX Runtime's
            choice.
        repeats: Timed rounds in each combination of provider, batch and threads.

    Raises:
        PatchError: If the model is not patched.
        ArgumentError: If a batch size, a number of threads or of repeats is impossible, or
            a lowering is unknown.
        ExportError: If a variant that was asked for cannot be exported.
    """
    _check_arguments(model, example_inputs, lowerings, batches, threads, repeats)
    inputs = _inputs_of(example_inputs, batches)
    working = working_providers(providers)
    # The CPU stands behind every other provider, for what that cannot run.
    timed = working if providers is None else [name for name in working if name in providers]
    groups: list[BenchGroup] = []
    notes: dict[str, None] = {}
    for provider in timed:
        with (
            os_errors_reported("cannot write the files to be timed", ExportError),
            tempfile.TemporaryDirectory() as folder,
        ):
            exported = _Exported(Path(folder), model, next(iter(inputs.values())), provider)
            exported.write(lowerings, naive)
            notes |= dict.fromkeys(exported.notes)
            choices = threads if provider == CPU else (0,)
            for (batch, feeds), count in itertools.product(inputs.items(), choices):
                groups.append(_group(exported, batch, feeds, count, repeats))
    sites = len(coord_layers(model))
    return BenchReport(tuple(groups), repeats, sites, describe_machine(), tuple(notes))


def _check_arguments(
    model: nn.Module,
    example_inputs: Any,
    lowerings: Sequence[str] | None,
    batches: Sequence[int] | None,
    threads: Sequence[int],
    repeats: int,
) -> None:
    require_coord_layers(model)
    if lowerings is not None and not set(lowerings) <= set(accepted_lowerings()):
        raise ArgumentError(f"lowerings={list(lowerings)}: write {', '.join(accepted_lowerings())}")
    if repeats < 1 or not threads or min(threads) < 0:
        raise ArgumentError(
            f"repeats={repeats}, threads={list(threads)}: at least one repeat, and numbers of "
            "threads from 0 (ONNX Runtime's choice) on"
        )
    if batches is not None:
        if not batches or min(batches) < 1:
            raise ArgumentError(f"batches={list(batches)}: write numbers from 1 on")
        if not isinstance(example_inputs, Tensor):
            raise ArgumentError(
                "batches= repeats a single tensor, but example_inputs are "
                f"{type(example_inputs).__name__}: leave batches out"
            )


def _inputs_of(example_inputs: Any, batches: Sequence[int] | None) -> dict[int, Any]:
    """The inputs of each batch size."""
    if batches is None:
        return {batch_size(example_inputs): example_inputs}
    image: Tensor = example_inputs[:1]
    return {batch: image.repeat(batch, *[1] * (image.dim() - 1)) for batch in batches}


class _Exported:
    """The ONNX files of one provider, by the variant's name, in the order of the table."""

    def __init__(self, folder: Path, model: nn.Module, inputs: Any, provider: str) -> None:
        self.provider = provider
        self.providers = working_providers([provider])
        if provider != CPU:
            # What TensorRT cannot run CUDA does, and the CPU what CUDA cannot.
            rest = working_providers()
            self.providers = (provider, *rest[rest.index(provider) + 1 :])
        self.files: dict[str, Path] = {}
        self.sizes: dict[str, int] = {}
        self.notes: list[str] = []
        self._folder = folder
        self._model = model
        self._inputs = inputs

    def write(self, lowerings: Sequence[str] | None, naive: bool) -> None:
        """Export the plain model, each lowering and the naive form.

        Lowerings that were not asked for by name are left out if the model has no such form.
        """
        plain = unpatch(self._model, discard=True)
        makers: dict[str, Callable[[Path], int]] = {
            PLAIN: functools.partial(self._export, plain, "auto")
        }
        for lowering in lowerings if lowerings is not None else accepted_lowerings():
            makers[lowering] = functools.partial(self._export, self._model, lowering)
        if naive:
            makers[NAIVE] = self._export_naive
        wanted = lowerings or ()
        with Progress("exporting", len(makers), unit="files") as progress:
            for name, make in makers.items():
                progress.describe(f"exporting {name} for {self.provider}")
                self._write(name, make, is_wanted=name == PLAIN or name in wanted)
                progress.step()

    def _write(self, name: str, make: Callable[[Path], int], *, is_wanted: bool) -> None:
        path = self._folder / f"{name.replace(' ', '-')}.onnx"
        try:
            self.sizes[name] = make(path)
        except ExportError as error:
            if is_wanted:
                raise
            reason = str(error).partition("\n")[0][:300]
            self.notes.append(f"{name} is left out: {reason}")
            return
        self.files[name] = path
        if name == PLAIN:
            self.files[PLAIN_AGAIN] = path
            self.sizes[PLAIN_AGAIN] = self.sizes[PLAIN]

    def _export(self, model: nn.Module, lowering: str, path: Path) -> int:
        dynamic_size = lowering in LOWERINGS and not LOWERINGS[lowering].fixes_size
        report = export_onnx(
            model,
            path,
            self._inputs,
            lowering=lowering,
            dynamic_batch=isinstance(self._inputs, Tensor),
            dynamic_size=dynamic_size,
            providers=self.providers,
            tolerance=self._tolerance,
        )
        chosen = Counter(report.lowerings.values())
        if chosen and set(chosen) != {lowering}:
            forms = ", ".join(f"{form} at {count}" for form, count in chosen.items())
            sites = "site" if sum(chosen.values()) == 1 else "sites"
            self.notes.append(f"{lowering} on {self.provider}: {forms} {sites}")
        if dynamic_size:
            self.notes.append(f"{lowering} is a file for any image size; the others fix it")
        return report.file_size

    def _export_naive(self, path: Path) -> int:
        return export_naive(
            self._model,
            path,
            self._inputs,
            dynamic_batch=isinstance(self._inputs, Tensor),
            providers=self.providers,
            tolerance=self._tolerance,
        )

    @property
    def _tolerance(self) -> float:
        return 1e-4 if self.provider == CPU else _GPU_TOLERANCE


def _group(exported: _Exported, batch: int, inputs: Any, threads: int, repeats: int) -> BenchGroup:
    """Time the variants at one batch size and number of threads."""
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors_in(inputs)]
    runs: Mapping[str, Callable[[], Any]] = {
        name: BoundRun(
            make_session(path, exported.providers, threads=threads, rests_between_runs=True), arrays
        )
        for name, path in exported.files.items()
    }
    seconds = alternate(
        runs, repeats=repeats, description=f"{exported.provider}, batch {batch}, {threads} threads"
    )
    rows = tuple(
        BenchRow(
            name,
            median(seconds[name]),
            ratio_of_medians(seconds[name], seconds[PLAIN]),
            exported.sizes[name],
        )
        for name in exported.files
    )
    return BenchGroup(exported.provider, batch, threads, rows)
