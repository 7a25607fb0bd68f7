"""What an export wrote, and how it was checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from coordconv_patch.display.parts import Facts
from coordconv_patch.display.shown import Shown, View
from coordconv_patch.errors import listing
from coordconv_patch.export.autotune import Trial
from coordconv_patch.export.graph_passes.refusals import Refusal
from coordconv_patch.layers.window import Window
from coordconv_patch.verification.check import Check

__all__ = ["ExportReport"]


@dataclass(frozen=True, repr=False)
class ExportReport(Shown):
    """What :func:`export_onnx` wrote, and how it was checked. ``print(report)`` shows it.

    Attributes:
        path: The ONNX file.
        file_size: Its size in bytes, with the weights beside it if there are such.
        nodes: Number of nodes by operator.
        coord_constant_bytes: Bytes of coordinate constants in the graph.
        lowerings: The lowering of each patched site, by site name.
        folded_batch_norms: Batch norms that went into the convolutions before them.
        exporter: ``"dynamo"`` (torch.export) or ``"torchscript"``.
        opset: The ONNX operator set.
        provider: The execution provider that the check ran on.
        dynamic_axes: Named axes of each graph input, by input name.
        checks: The comparisons with torch.
        notes: What else happened; a fallback to the other exporter, say.
        coordinate_nodes: Names of the nodes that compute with coordinates alone: what a
            quantizer has to leave out (``nodes_to_exclude``), see docs/compression.md.
        trials: What ``lowering="autotune"`` timed, in order.
        windows: The windows whose coordinates are in the file, each with its site names: such a
            file is for that part of an image alone. Empty where inputs are whole images.
        refusals: What could not be rewritten for the runtime, place by place, and why. The file
            is right all the same, but may be slower or larger there.
        target: What the file is meant for.
        growth: Bytes of the file that are there for coordinates: constants, and weights of their
            own.
    """

    path: Path
    file_size: int
    nodes: dict[str, int]
    coord_constant_bytes: int
    lowerings: dict[str, str]
    folded_batch_norms: int
    exporter: str
    opset: int
    provider: str
    dynamic_axes: dict[str, dict[int, str]]
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    coordinate_nodes: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    windows: dict[Window, tuple[str, ...]] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    target: str = "onnxruntime"
    growth: int = 0

    @property
    def worst_difference(self) -> float:
        """Largest difference from torch in any check, relative to the largest output."""
        return max(check.difference for check in self.checks)

    def summary(self) -> str:
        """One line: the file, its size, and how far it is from torch."""
        return (
            f"{self.path}, {_megabytes(self.file_size)}, {self._forms() or 'no coordinates'}, "
            f"differs by {self.worst_difference:.2g}"
        )

    def view(self) -> View:
        """The report, a line for each fact."""
        return View(str(self.path), (Facts(tuple(self._facts())),))

    def _forms(self) -> str:
        kinds = Counter(self.lowerings.values())
        return ", ".join(f"{count} as {kind}" for kind, count in kinds.items())

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "file", f"{_megabytes(self.file_size)}, opset {self.opset}"
        yield "target", self.target
        yield "exporter", self.exporter
        yield "nodes", ", ".join(f"{count} {op}" for op, count in self.nodes.items())
        yield "coordinate sites", self._forms() or "none"
        for window, names in self.windows.items():
            yield "window", f"{window}, at {listing(names)}"
        yield "batch norms folded", str(self.folded_batch_norms)
        yield "coordinate constants", f"{self.coord_constant_bytes:,} bytes"
        rest = max(self.file_size - self.growth, 1)
        yield (
            "file growth",
            f"{_megabytes(self.growth)} for coordinates ({self.growth / rest:+.1%})",
        )
        axes = (f"{name}: {', '.join(names.values())}" for name, names in self.dynamic_axes.items())
        yield "dynamic axes", "; ".join(axes) or "none"
        yield "checked on", self.provider
        for check in self.checks:
            yield f"  {check.inputs}", _outcome(check)
        for trial in self.trials:
            yield f"  {trial.group}, {trial.sites} sites", _result(trial)
        for (rewrite, reason), places in _by_reason(self.refusals).items():
            yield "not rewritten", f"{rewrite} at {listing(places)}: {reason}"
        for note in self.notes:
            yield "note", note


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _by_reason(refusals: Iterable[Refusal]) -> dict[tuple[str, str], list[str]]:
    places: dict[tuple[str, str], list[str]] = {}
    for refusal in refusals:
        places.setdefault((refusal.rewrite, refusal.reason), []).append(refusal.place)
    return places


def _result(trial: Trial) -> str:
    if trial.ratio is None:
        return f"{trial.lowering}: {trial.obstacle}"
    time = f"{trial.seconds * 1e3:.2f} ms, {trial.ratio} of the fastest before"
    return f"{trial.lowering}: {time}{', kept' if trial.kept else ''}"


def _outcome(check: Check) -> str:
    text = f"differs by {check.difference:.2g}"
    if check.detections is not None:
        text += f", {check.detections} detections"
    if check.unstable:
        text += f", and {check.unstable} that rounding decides in torch too"
    return text
