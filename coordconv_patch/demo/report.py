"""What the demo measured."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordconv_patch.demo.backbone import Prediction
from coordconv_patch.demo.finetune import Curve, Errors, Settings
from coordconv_patch.errors import ExportError
from coordconv_patch.files.atomic import replacement

__all__ = ["DemoReport", "ExportCheck", "PhotographResult"]


@dataclass(frozen=True)
class PhotographResult:
    """The most probable classes of a photograph of ``skimage.data``, before and after patching."""

    name: str
    before: list[Prediction]
    after: list[Prediction]


@dataclass(frozen=True)
class ExportCheck:
    """The ONNX file, run on the held-out pictures.

    Attributes:
        provider: ONNX Runtime's execution provider that ran.
        bytes: Size of the file.
        coord_constant_bytes: Bytes of coordinate constants in it.
        worst_difference: Largest difference from torch that the export's own check saw,
            relative to the largest output.
        worst_difference_px: Largest difference from torch over all held-out pictures, in pixels.
        median_error_px: Median distance of the file's answers from the truth, in pixels.
    """

    provider: str
    bytes: int
    coord_constant_bytes: int
    worst_difference: float
    worst_difference_px: float
    median_error_px: float


@dataclass(frozen=True)
class DemoReport:
    """Every figure of one run; ``report.json`` holds the same.

    Attributes:
        versions: Of the packages that matter.
        seed: Of everything random.
        threads: Threads that torch used.
        quick: Whether this was the shortened run.
        backbone: Name of the timm model.
        photographs: The pretrained model's predictions, before and after patching.
        logits: Numbers compared before and after patching.
        logits_equal: Whether all of them were equal to the last bit.
        where: Selectors of the patched convolutions.
        sites: Names of the patched convolutions.
        coord_parameters: Coordinate weights added.
        model_parameters: The position model's parameters without them.
        picture_size: Height and width of the task's pictures, in pixels.
        training_photographs: What the training pictures were made from.
        held_out_photographs: What the held-out pictures were made from.
        held_out_pictures: Number of held-out pictures.
        settings: How both models were fine-tuned.
        starts_equal: Whether both models gave the same answers, to the last bit, before
            the first step.
        curves: ``control`` and ``patched``: how they learned.
        errors: Held-out errors in pixels: ``control``, ``patched``, ``patched, coordinates
            off`` (the trained coordinate weights set to zero) and ``always the middle``.
        site_shares: For each patched convolution, the standard deviation of what the
            coordinates add, over that of what the picture gives.
        export: The ONNX file's check.
        seconds: Wall time of each part, and in all.
        files: What was left behind, by what it is.
    """

    versions: dict[str, str]
    seed: int
    threads: int
    quick: bool
    backbone: str
    photographs: list[PhotographResult]
    logits: int
    logits_equal: bool
    where: list[str]
    sites: list[str]
    coord_parameters: int
    model_parameters: int
    picture_size: int
    training_photographs: list[str]
    held_out_photographs: list[str]
    held_out_pictures: int
    settings: Settings
    starts_equal: bool
    curves: dict[str, Curve]
    errors: dict[str, Errors]
    site_shares: dict[str, float]
    export: ExportCheck
    seconds: dict[str, float]
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return dataclasses.asdict(self)

    def write(self, path: Path) -> None:
        """Write the report as JSON, or raise an ExportError."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        with replacement(path, ExportError) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def findings(self) -> list[str]:
        """One sentence for each phase of the fine-tuning: who came closer."""
        return [
            compare(phase.title, control.median, patched.median)
            for phase, control, patched in zip(
                self.settings.phases,
                self.curves["control"].phase_errors,
                self.curves["patched"].phase_errors,
                strict=True,
            )
        ]


def compare(phase: str, control: float, patched: float) -> str:
    """The median errors of both models after a phase, in pixels, in words."""
    figures = f"{phase}: {patched:.1f} px off with coordinates, {control:.1f} px without"
    if patched < 0.9 * control:
        return f"{figures} ({control / patched:.1f} times closer)"
    if control < 0.9 * patched:
        return f"{figures} (the control is better)"
    return f"{figures} (no real difference)"
