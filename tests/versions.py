"""Run the core tests on any torch and Python, in an environment of their own, and record it.

    python tests/versions.py 2.6.0
    python tests/versions.py 2.14.1 --python python3.13
    python tests/versions.py --show

makes a virtual environment in a temporary folder (6 GB, deleted afterwards), installs that torch,
the torchvision that belongs to it and the extra ``core-test``, runs the tests, and writes a row
into docs/versions.json, and with it the table in docs/versions.md. It ends with 1 if a test fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"

# The core: what runs with the packages of the extra "core-test" alone.
CORE = (
    *("channels", "concatenated", "export", "files", "folding", "followers", "graphs", "layers"),
    *("left_behind", "lowering", "owners", "patching", "pictures", "running", "runtime", "sites"),
    *("verification", "weights"),
    *("test_packages.py", "test_status.py", "test_training.py", "test_wrong_arguments.py"),
)

NEEDS_MORE = {
    "export/test_detectors.py": "scikit-image, facenet-pytorch",
    "followers/test_letterboxes.py": "ultralytics",
    "followers/test_padded_batches.py"
    "::test_hugging_faces_detr_depends_on_others_no_more_than_the_plain_one": "transformers",
    "layers/test_bit_equality.py": "scikit-image, facenet-pytorch",
    "patching/test_odd_convs.py::test_torchao_weights_are_refused": "torchao",
    "patching/test_plan_notes.py::test_transformers_models_are_noted_by_their_mask": "transformers",
    "pictures/test_docstring_examples.py"
    "::test_the_example_of_placed_transform_runs": "torchvision 0.23",
    "pictures/test_placed_transform.py": "albumentations",
    "pictures/test_tiles.py": "monai",
    "pictures/test_turns.py": "diffusers",
    "sites/test_placements.py": "ultralytics",
}
"""Files and tests of those folders that are left out, with the packages that they need."""

# What .ci/run has the time for, beside the whole suite on the newest torch.
SHORT = (
    *("channels", "graphs", "layers", "lowering", "owners", "patching", "sites"),
    *("folding/test_batch_norms.py", "weights/test_weights.py", "export/test_export.py"),
    *("test_packages.py", "test_status.py", "test_training.py"),
)

VERSIONS_OF = ("torch", "torchvision", "timm", "numpy", "onnx", "onnxscript", "onnxruntime")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the number of failed tests, at most 1."""
    options = _options(arguments)
    if options.show:
        print(table(json.loads(RECORD.read_text(encoding="utf-8"))))
        return 0
    with _folder(options.folder) as folder:
        python = environment(folder, options.torch, options.python)
        row = {**versions(python), **run(python, folder, options)}
    print(f"torch {row['torch']}: {row['passed']} passed, {row['failed']} failed")
    if options.record:
        record(row)
    return int(bool(row["failed"]) or not row["passed"])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("torch", nargs="?", help="a version of torch, such as 2.6.0")
    parser.add_argument("--python", default=sys.executable, help="the interpreter [this one]")
    parser.add_argument("--short", action="store_true", help="only what .ci/run has time for")
    parser.add_argument("--jobs", default="2", help="processes that run tests [2]")
    parser.add_argument("--folder", type=Path, help="keep the environment in this folder")
    parser.add_argument("--no-record", dest="record", action="store_false", help="write no row")
    parser.add_argument("--show", action="store_true", help="print the table and run nothing")
    options = parser.parse_args(arguments)
    if not (options.torch or options.show):
        parser.error("which version of torch?")
    return options


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def environment(folder: Path, torch: str, interpreter: str) -> Path:
    """The interpreter of a virtual environment with that torch, made unless it is there."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder / "venv"], check=True)
        # torchvision demands its torch by number, so pip picks the right one; "===", as "==" takes
        # builds for a certain device too, which are not that one.
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"torch==={torch}", "torchvision"], check=True)
        subprocess.run([*pip, f"torch==={torch}", "-e", f"{ROOT}[core-test]"], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """The versions of an environment's packages, and of its Python."""
    code = (
        "import json, platform; from importlib.metadata import version\n"
        f"print(json.dumps({{'python': platform.python_version()}} | "
        f"{{name: version(name) for name in {VERSIONS_OF}}}))"
    )
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(ran.stdout))


def run(python: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the tests in an environment; how many passed, and which failed."""
    report = folder / "report.xml"
    tests = [ROOT / "tests" / name for name in (SHORT if options.short else CORE)]
    left_out = [
        f"--deselect=tests/{name}" if "::" in name else f"--ignore={ROOT / 'tests' / name}"
        for name in NEEDS_MORE
    ]
    subprocess.run(
        [
            *(python, "-m", "pytest", *tests, *left_out, "-q", "-n", options.jobs),
            *("--tb=short", "--show-capture=no", "-p", "no:cacheprovider"),
            f"--junitxml={report}",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [case for case in cases if {child.tag for child in case} & {"failure", "error"}]
    return {
        "tests": "short" if options.short else "core",
        "passed": sum(not len(case.findall("skipped")) for case in cases) - len(failures),
        "failed": len(failures),
        "failures": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failures),
    }


def record(row: dict[str, Any]) -> None:
    """Put a row into the record, in the place of an older one of the same versions."""
    rows = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
    kept = [each for each in rows if _key(each) != _key(row)]
    rows = sorted([*kept, row], key=_key)
    RECORD.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}", encoding="utf-8")


BEGIN, END = "<!-- table: python tests/versions.py -->", "<!-- end of table -->"


def _key(row: dict[str, Any]) -> tuple[list[int], list[int], str]:
    torch, python = row["torch"].partition("+")[0], row["python"]
    return [*map(int, torch.split("."))], [*map(int, python.split("."))], row["tests"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The record in Markdown."""
    columns = ("torch", "python", "torchvision", "timm", "onnxscript", "onnxruntime")
    lines = [
        f"| {' | '.join(columns)} | tests | passed | failed |",
        f"|{'---|' * (len(columns) + 1)}--:|--:|",
    ]
    for row in rows:
        cells = [row[column].partition("+")[0] for column in columns]
        counts = [row["tests"], f"{row['passed']:,}", f"{row['failed']:,}"]
        lines.append(f"| {' | '.join([*cells, *counts])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
