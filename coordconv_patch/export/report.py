"""What an export wrote, and how it was checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coordconv_patch.errors import listing
from coordconv_patch.export.autotune import Trial
from coordconv_patch.export.graph_passes.refusals import Refusal
from coordconv_patch.layers.window import Window
from coordconv_patch.verification.check import Check

__all__ = ["ExportReport"]


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_onnx` wrote, and how it was checked. ``print(report)`` shows a table.

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
            quantizer has to leave out (``nodes_to_exclude``), see docs/deployment.md.
        trials: What ``lowering="autotune"`` timed, in order.
        windows: The windows whose coordinates are in the file, each with its site names: such a
            file is for that part of an image alone. Empty where inputs are whole images.
        refusals: What could not be rewritten for the runtime, place by place, and why. The file
            is right all the same, but may be slower or larger there.
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

    @property
    def worst_difference(self) -> float:
        """Largest difference from torch in any check, relative to the largest output."""
        return max(check.difference for check in self.checks)

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title=str(self.path), title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        kinds = Counter(self.lowerings.values())
        forms = ", ".join(f"{count} as {kind}" for kind, count in kinds.items())
        table.add_row("file", f"{self.file_size / 1e6:.2f} MB, opset {self.opset}")
        table.add_row("exporter", self.exporter)
        table.add_row("nodes", ", ".join(f"{count} {op}" for op, count in self.nodes.items()))
        table.add_row("coordinate sites", forms or "none")
        for window, names in self.windows.items():
            table.add_row("window", f"{window}, at {listing(names)}")
        table.add_row("batch norms folded", str(self.folded_batch_norms))
        table.add_row("coordinate constants", f"{self.coord_constant_bytes:,} bytes")
        table.add_row(
            "dynamic axes",
            "; ".join(
                f"{name}: {', '.join(axes.values())}" for name, axes in self.dynamic_axes.items()
            )
            or "none",
        )
        table.add_row("checked on", self.provider)
        for check in self.checks:
            table.add_row(f"  {check.inputs}", _outcome(check))
        for trial in self.trials:
            table.add_row(f"  {trial.group}, {trial.sites} sites", _result(trial))
        for (rewrite, reason), places in _by_reason(self.refusals).items():
            table.add_row("not rewritten", f"{rewrite} at {listing(places)}: {reason}")
        for note in self.notes:
            table.add_row("note", note)
        return table

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


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
