"""The figures of the README are those of the records."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "")


def record(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def row(name: str) -> list[str]:
    """The cells of the row of a table that begins with a name."""
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def mean(experiment: str, setting: str, variant: str, metric: str) -> float:
    runs = record(f"examples/paper/results/{experiment}.json")["runs"]
    chosen = [run for run in runs if (run["setting"], run["variant"]) == (setting, variant)]
    assert len(chosen) >= 2
    return statistics.mean(run["metrics"][metric] for run in chosen)


def test_the_demos_figures() -> None:
    demo = record("docs/demo.json")
    frozen = [demo["curves"][name]["phase_errors"][0]["median"] for name in ("control", "patched")]
    middle = demo["errors"]["always the middle"]["median"]
    assert row("find a cup") == [*px(*frozen), f"always the middle: {middle:.1f} px"]
    trained = [demo["errors"][name]["median"] for name in ("control", "patched")]
    off = demo["errors"]["patched, coordinates off"]["median"]
    assert row("the same, last stages") == [*px(*trained), f"coordinates off: {off:.1f} px"]
    assert demo["threads"] == 2
    assert f"{demo['seconds']['in all']:.0f} seconds on two CPU cores" in TEXT


def px(*errors: float) -> list[str]:
    return [f"{error:.1f} px" for error in errors]


def test_the_crops() -> None:
    runs = record("examples/places/results/crops_and_tiles.json")["runs"]

    def span(variant: str) -> str:
        errors = [
            run["metrics"]["error on crops, px"]
            for run in runs
            if (run["setting"], run["variant"]) == ("crops", variant)
        ]
        return f"{min(errors):.1f}–{max(errors):.1f} px"

    plain, patched, control = row("where on the canvas")
    assert plain == span("plain")
    assert patched == f"{span('patched, places')} with places"
    assert control == f"without places: {span('patched')}"


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("localiser that sees 15", "narrow view, unpadded"),
        ("the same, at positions", "narrow view, unpadded, new places"),
    ],
)
def test_the_localiser(name: str, setting: str) -> None:
    variants = ("plain, kept on", "patched: first", "patched: first, scrambled")
    plain, patched, scrambled = (
        f"{mean('finetune', setting, variant, 'IOU'):.2f}" for variant in variants
    )
    assert row(name) == [plain, patched, f"scrambled coordinates: {scrambled}"]


@pytest.mark.parametrize(
    ("name", "experiment", "setting", "metric", "form"),
    [
        ("classification", "image_classification", "resnet18, digits", "accuracy", ".3f"),
        ("Faster R-CNN", "detection", "Faster R-CNN", "IOU of best boxes", ".3f"),
    ],
)
def test_where_there_is_no_gain(
    name: str, experiment: str, setting: str, metric: str, form: str
) -> None:
    values = [mean(experiment, setting, variant, metric) for variant in ("plain", "patched")]
    assert row(name) == [f"{value:{form}}" for value in values]


def test_ms_pacman() -> None:
    metric = "return after 240,000 steps"
    plain = mean("ms_pacman", "1.2 million steps", "plain", metric)
    patched = mean("ms_pacman", "240,000 steps", "patched", metric)
    assert row("A2C on Ms. Pac-Man") == [f"{plain:.0f}", f"{patched:.0f}"]


def test_the_costs() -> None:
    results = record("benchmarks/results/onnx_runtime.json")["results"]
    models = {
        "ResNet-50": "resnet50",
        "MobileNetV3-Large": "mobilenetv3",
        "ConvNeXt-Tiny": "convnext",
        "YOLO11n": "yolo11n",
    }
    for title, name in models.items():
        variants = results[f"{name}, onnxruntime, batch 1, threads 1"]["variants"]
        names = ("first", "all", "all, port, buffer")
        assert row(title) == [f"{variants[variant]['ratio']:.2f}" for variant in names]


def test_the_versions_are_those_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"', project, re.MULTILINE)
    (torch,) = re.findall(r'"torch>=([\d.]+)"', project)
    assert f"Python {python} or later, torch {torch} or later" in TEXT


def test_the_size_of_an_installation() -> None:
    sizes = record("docs/install.json")["megabytes"]
    torch = sum(sizes[name] for name in ("torch", "CUDA libraries (nvidia)", "triton"))
    whole = sizes["whole environment"]
    assert f"{whole / 1000:.1f} GB of disk, {torch / 1000:.1f} GB of them for torch" in TEXT
