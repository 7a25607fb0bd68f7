"""Every code block of the README and of docs/ runs as it stands, in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from documentation.code_blocks import FENCE, PAGES, SKIP, PageRun

SLOW = {
    "docs/command_line.md": "exports and benchmarks a model",
    "docs/compression.md": "quantizes a model in three ways",
    "docs/deployment.md": "autotune exports a model several times",
    "docs/detectors.md": "exports a detector by two exporters",
    "docs/export.md": "exports a model five times",
    "docs/outside_onnx.md": "compiles a model by AOTInductor",
    "docs/places.md": "imports MONAI and diffusers",
    "docs/training_tools.md": "trains with transformers, PEFT and stable-baselines3",
    "docs/ultralytics.md": "trains a YOLO",
}
"""Pages that take long, and why: ``pytest -m docs``, which .ci/run calls too."""

NOT_RUN = {
    ("CONTRIBUTING.md", "installs packages; .ci/run does it"),
    ("README.md", "installs packages; .ci/run does it"),
    ("docs/outside_onnx.md", "needs ExecuTorch"),
    ("docs/compression.md", "installs four tools"),
    ("docs/runtimes.md", "installs eleven runtimes"),
    ("docs/versions.md", "installs torch; .ci/run does it with 2.6"),
    ("docs/zoo.md", "hours, and downloads of packages"),
    ("examples/paper/README.md", "hours"),
    ("examples/ranking/README.md", "hours"),
}
"""Blocks that cannot run here: the page, and the reason that stands above the block."""

pages = [
    pytest.param(name, marks=[pytest.mark.docs] if name in SLOW else [])
    for name, path in PAGES.items()
    if FENCE.search(path.read_text(encoding="utf-8"))
]


@pytest.mark.usefixtures("one_thread", "registries")
@pytest.mark.parametrize("name", pages)
def test_the_blocks_of_a_page_run(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    page = PageRun(PAGES[name], monkeypatch, capsys)
    blocks = len(FENCE.findall(PAGES[name].read_text(encoding="utf-8"))) // 2
    other = sum(1 for _ in SKIP.finditer(page.document.text))
    data = sum(page.document.text.count(f"```{language}\n") for language in ("toml", "yaml"))
    assert page.run() == blocks - other - data


def test_what_does_not_run_says_why() -> None:
    skipped = {
        (name, reason)
        for name, path in PAGES.items()
        for reason in SKIP.findall(path.read_text(encoding="utf-8"))
    }
    assert skipped == NOT_RUN


@pytest.mark.parametrize("name", PAGES)
def test_a_block_names_its_language(name: str) -> None:
    fences = FENCE.findall(PAGES[name].read_text(encoding="utf-8"))
    assert set(fences[::2]) <= {"python", "bash", "text", "toml", "yaml"}
    assert set(fences[1::2]) <= {""}
