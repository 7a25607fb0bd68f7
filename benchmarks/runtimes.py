"""Which runtime runs which file, how far it is from torch there, and at what speed.

Every convolution of a model has coordinates (standard deviation 0.02). Each runtime runs the plain
model's file, the default file and that of its target, at batch 1 and 2, beside torch.

Runtimes that are not in the [test] extra stand in environments of their own, in one folder:

    python benchmarks/runtimes.py --environments FOLDER --install
    python benchmarks/runtimes.py --environments FOLDER
    python benchmarks/runtimes.py --write-page        # docs/runtimes.md, from the record

Core ML and TensorRT are not among them: there is no machine with either.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared.models import MODELS, FirstOutput, Tiny
from shared.ports import BufferCoords, ported
from shared.record import make_parser, open_record
from shared.variants import patched_names
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.bench.report import markdown_table
from coordconv_patch.export.targets import TARGETS
from coordconv_patch.runtime.providers import CPU
from coordconv_patch.runtime.timing import ratio_of_medians

__all__ = [
    "RUNTIMES",
    "SUBJECTS",
    "MissingRuntimeError",
    "Runtime",
    "main",
    "measured",
    "python_of",
]

NAME = "runtimes"
PAGE = Path(__file__).parents[1] / "docs" / "runtimes.md"
TOLERANCE = 1e-5
"""Of the largest output; dropping the coordinates moves the outputs by 0.01 and more."""

_RUNNERS = Path(__file__).parent / "shared" / "runners.py"


@dataclass(frozen=True)
class Runtime:
    """A runtime, the target that files for it are exported with, and what installs it.

    Attributes:
        title: What the page calls it.
        target: The name of a target.
        packages: What pip installs into its environment; empty: it is in the [test] extra.
        npm: What npm installs there.
        any_size: Whether files of ``dynamic_size=True`` are run, too.
        fixed_batch: Whether files of ``dynamic_batch=False`` are run, too.
    """

    title: str
    target: str
    packages: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    any_size: bool = False
    fixed_batch: bool = False

    def runs(self, form: str) -> bool:
        """Whether a form is run here."""
        target = TARGETS[self.target]
        stores_maps = target.lowering == TARGETS["portable"].lowering and target.whole_constants
        left_out = {
            "any size": not self.any_size,
            "fixed": not self.fixed_batch,
            "portable": stores_maps,
        }
        return not left_out.get(form, False)

    def install_commands(self, folder: Path) -> list[list[str]]:
        """The commands that install it into its own folder."""
        commands = [[sys.executable, "-m", "venv", str(folder)]]
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "numpy", *self.packages]
        commands.append(pip)
        if self.npm:
            commands.append(["npm", "install", "--prefix", str(folder), *self.npm])
        return commands


RUNTIMES = {
    "onnxruntime": Runtime("ONNX Runtime, CPU", "onnxruntime", any_size=True, fixed_batch=True),
    "openvino": Runtime(
        "OpenVINO, sizes fixed at load", "openvino", any_size=True, fixed_batch=True
    ),
    "openvino_dynamic": Runtime("OpenVINO, dynamic axes", "openvino", any_size=True),
    "opencv": Runtime("OpenCV, new engine", "opencv"),
    "opencv_classic": Runtime("OpenCV, classic engine", "opencv"),
    "web": Runtime("onnxruntime-web (wasm, node)", "web", npm=("onnxruntime-web",), any_size=True),
    "chromium": Runtime("onnxruntime-web (wasm, Chromium)", "web", npm=("onnxruntime-web",)),
    "mnn": Runtime("MNN", "mnn", ("MNN",), any_size=True),
    "ncnn": Runtime("ncnn, by pnnx", "ncnn", ("ncnn", "pnnx")),
    "litert": Runtime(
        "LiteRT, by onnx2tf",
        "litert",
        (
            *("onnx2tf", "ai-edge-litert", "onnx", "onnxruntime", "onnxsim", "onnx_graphsurgeon"),
            *("tf_keras", "psutil", "sng4onnx"),
        ),
    ),
    "tract": Runtime("tract", "portable", ("tract",)),
}


@dataclass(frozen=True)
class Subject:
    """A model and its images' size; ``other_size`` for files of any size."""

    make: Callable[[], nn.Module]
    size: tuple[int, int]
    other_size: tuple[int, int]


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name)

    return make


SUBJECTS = {
    "tiny": Subject(Tiny, (32, 32), (48, 40)),
    "resnet18": Subject(_timm("resnet18"), (96, 96), (128, 96)),
    "resnet50": Subject(_timm("resnet50"), (224, 224), (256, 224)),
    "mobilenetv3": Subject(_timm("mobilenetv3_small_100"), (224, 224), (256, 224)),
    "yolo11n": Subject(MODELS["yolo11n"].make, (160, 160), (192, 160)),
}

FORMS = {
    "plain": "plain",
    "concatenated": "concatenated",
    "default": "default file",
    "target": "its target",
    "fixed": "its target, fixed batch",
    "portable": "portable",
    "any size": "its target, any size",
}
"""The plain model; the usual CoordConv layer with its coordinates in buffers; the default file;
that of the runtime's target, that with a fixed batch, that of the target "portable" where it is
another one, and that with dynamic sizes. By the page's words."""


class MissingRuntimeError(Exception):
    """A runtime is not installed; the message has the command that installs it."""


def python_of(name: str, environments: Path | None) -> str:
    """The interpreter that has a runtime.

    Raises:
        MissingRuntimeError: If there is none.
    """
    runtime = RUNTIMES[name]
    if not runtime.packages and not runtime.npm:
        return sys.executable
    folder = (environments or Path("FOLDER")) / name
    python = folder / "bin" / "python"
    if not python.exists():
        commands = " && ".join(" ".join(each) for each in runtime.install_commands(folder))
        raise MissingRuntimeError(f"{runtime.title} is not installed in {folder}: {commands}")
    return str(python)


def prepared(subject: Subject) -> dict[str, nn.Module]:
    """By form: a model with random weights, plain and with coordinates in every convolution."""
    torch.manual_seed(0)
    plain = subject.make().eval()
    for module in plain.modules():  # an exporter's switch in ultralytics' heads
        if hasattr(module, "export") and isinstance(module.export, bool):
            module.export = True
    if isinstance(plain, FirstOutput):
        plain = plain.model.eval()
    images = pictures(2, subject.size)
    patched = ccp.patch(plain, "all", example_inputs=images)
    with torch.no_grad():
        for weight in ccp.coord_parameters(patched):
            weight.normal_(std=0.02)
    concatenated = ported(plain, patched_names(patched), BufferCoords, images)
    return {**dict.fromkeys(FORMS, patched), "plain": plain, "concatenated": concatenated}


def pictures(batch: int, size: tuple[int, int]) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


def measured(
    name: str,
    subject: Subject,
    models: Mapping[str, nn.Module],
    batch: int,
    python: str,
    *,
    rounds: int = 0,
    seconds: float = 0.0,
    forms: Iterable[str] = FORMS,
) -> dict[str, Any]:
    """The cells of one runtime and model: by form its difference from torch, or what failed.

    Returns:
        ``{form: {"difference": D, "file_size": B, "ratio": R} or {"refused": reason}}``; the ratio
        is to the plain file, in the same process.
    """
    runtime = RUNTIMES[name]
    cells: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        files: dict[str, Path] = {}
        for form in forms:
            if not runtime.runs(form):
                continue
            try:
                files[form] = _exported(form, runtime, subject, models[form], batch, folder)
            except ccp.CoordConvPatchError as error:
                cells[form] = {"refused": f"export: {error}"[:300]}
        alone = {
            form: _ran(name, python, {form: path}, _images(form, batch, subject), folder)[form]
            for form, path in files.items()
        }
        for form, output in alone.items():
            if isinstance(output, str):
                cells[form] = {"refused": output}
                continue
            with torch.no_grad():
                expected = models[form](_images(form, batch, subject))
            cells[form] = {
                "difference": _difference(output[0], expected),
                "file_size": files[form].stat().st_size,
            }
        right = {
            form: path
            for form, path in files.items()
            if form != "any size" and "difference" in cells[form]
        }
        if rounds and "plain" in right:
            shown = _images("plain", batch, subject)
            timed = _ran(name, python, right, shown, folder, rounds, seconds)
            plain = timed["plain"]
            for form, result in timed.items():
                if not isinstance(result, str) and not isinstance(plain, str):
                    cells[form]["ratio"] = ratio_of_medians(result[1], plain[1]).value
    return cells


def _images(form: str, batch: int, subject: Subject) -> Tensor:
    return pictures(batch, subject.other_size if form == "any size" else subject.size)


def _exported(
    form: str,
    runtime: Runtime,
    subject: Subject,
    model: nn.Module,
    batch: int,
    folder: Path,
) -> Path:
    """The file of a form; of a fixed batch where the target takes no other."""
    path = folder / f"{form.replace(' ', '_')}.onnx"
    fixed = form == "fixed" or runtime.target == "litert"
    ccp.export_onnx(
        model,
        path,
        pictures(batch if fixed else 2, subject.size),
        target={"default": "onnxruntime", "portable": "portable"}.get(form, runtime.target),
        dynamic_batch=not fixed,
        dynamic_size=form == "any size",
        providers=[CPU],
        tolerance=1e-3,
    )
    return path


def _ran(
    name: str,
    python: str,
    files: Mapping[str, Path],
    images: Tensor,
    folder: Path,
    rounds: int = 0,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """By form: the output and the seconds of each round; or what failed, which all share."""
    np.save(folder / "images.npy", images.numpy())
    pairs = [
        part for form, path in files.items() for part in (str(path), str(folder / f"{form}.npy"))
    ]
    least = [str(rounds), str(seconds)]
    command = [python, str(_RUNNERS), name, *least, str(folder / "images.npy"), *pairs]
    try:
        ran = subprocess.run(
            command,
            env=_environment(python),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(files, "no end within 15 minutes")
    if ran.returncode:
        lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|error)\b", line)]
        reason = (named or lines or [f"exit code {ran.returncode}"])[-1]
        return dict.fromkeys(files, re.sub(r"/[\w./-]*/", "", reason)[:300])
    times_of = json.loads(ran.stdout.splitlines()[-1])
    return {
        form: (np.load(folder / f"{form}.npy"), times)
        for form, times in zip(files, times_of, strict=True)
    }


def _environment(python: str) -> dict[str, str]:
    """Of a runtime's process: its own commands come first, and nothing can install anything.

    A converter may call ``pip`` by itself, which would be that of whoever runs this script.
    """
    variables = {name: text for name, text in os.environ.items() if name != "VIRTUAL_ENV"}
    if python != sys.executable:
        variables.pop("PYTHONPATH", None)
        variables["PATH"] = os.pathsep.join((str(Path(python).parent), variables.get("PATH", "")))
    return variables | {"PIP_NO_INDEX": "1", "PIP_NO_INPUT": "1"}


def _difference(output: np.ndarray, expected: Any) -> float:
    """Of the largest output; infinite where the batch is another one."""
    wanted = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    if output.size != wanted.size or len(output) != len(wanted):
        return float("inf")
    return float(np.abs(output.reshape(wanted.shape) - wanted).max() / np.abs(wanted).max())


def verdict(cell: Mapping[str, Any]) -> str:
    """What the page says of a cell."""
    if "refused" in cell:
        return "refused"
    return "ok" if cell["difference"] <= TOLERANCE else f"**wrong** ({cell['difference']:.1g})"


def page_table(results: Mapping[str, Any]) -> str:
    """The matrix in Markdown: both batches, and the ratios at batch 1."""
    rows = []
    for key, batches in _by_runtime_and_model(results):
        runtime, model = key
        row = [RUNTIMES[runtime].title, model]
        for form in FORMS:
            row.append(_said([cells[form] for cells in batches if form in cells], form))
        rows.append(tuple(row))
    titles = ("runtime", "model", *FORMS.values())
    return "\n".join(markdown_table(titles, rows))


def _said(cells: Sequence[Mapping[str, Any]], form: str) -> str:
    """What the page says of a form at batch 1 and 2, and its ratio at batch 1."""
    verdicts = [verdict(cell) for cell in cells]
    if cells and "ratio" in cells[0] and form != "plain":
        verdicts[0] += f", {cells[0]['ratio']:.2f}"
    if len({verdict(cell) for cell in cells}) > 1:
        return "; ".join(f"batch {n}: {text}" for n, text in enumerate(verdicts, start=1))
    return verdicts[0] if verdicts else ""


def _by_runtime_and_model(
    results: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    for runtime in RUNTIMES:
        for model in SUBJECTS:
            keys = [f"{runtime} {model} {batch}" for batch in (1, 2)]
            batches = [results[key] for key in keys if key in results]
            if batches:
                yield (runtime, model), batches


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__ or "", ("resnet18", "mobilenetv3", "yolo11n"))
    parser.add_argument("--environments", type=Path, metavar="FOLDER")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--install", action="store_true", help="install the runtimes, no more")
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed runs of each file, at least; 0: none"
    )
    parser.add_argument("--write-page", action="store_true", help="write docs/runtimes.md")
    options = parser.parse_args(arguments)
    if options.install:
        _install(options)
        return
    if options.quick:
        options.models, options.rounds, options.seconds = ["tiny"], 2, 0.0
        options.runtimes = ["onnxruntime"]
    options.show = options.show or options.write_page
    pythons = {} if options.show else _pythons(options)
    record = open_record(options, NAME)
    for model in [] if options.show else options.models:
        models = prepared(SUBJECTS[model])
        for name, python in pythons.items():
            for batch in (1, 2):
                timed = batch == 1 and options.rounds > 0
                least = {"rounds": options.rounds, "seconds": options.seconds} if timed else {}
                record.measure(
                    f"{name} {model} {batch}",
                    partial(measured, **least),
                    *(name, SUBJECTS[model], models, batch, python),
                )
    table = page_table(record.results)
    print(table)
    if options.write_page:
        before, start, rest = PAGE.read_text(encoding="utf-8").partition("<!-- matrix -->\n")
        end = "<!-- end -->\n" + rest.partition("<!-- end -->\n")[2]
        PAGE.write_text(f"{before}{start}{table}\n{end}", encoding="utf-8")


def _pythons(options: argparse.Namespace) -> dict[str, str]:
    """The interpreters of all runtimes that are asked for; ends if one is missing."""
    try:
        return {name: python_of(name, options.environments) for name in options.runtimes}
    except MissingRuntimeError as error:
        raise SystemExit(f"{error}\n(or all: --environments FOLDER --install)") from error


def _install(options: argparse.Namespace) -> None:
    if options.environments is None:
        raise SystemExit("--install needs --environments FOLDER")
    for name in options.runtimes:
        runtime = RUNTIMES[name]
        if runtime.packages or runtime.npm:
            for command in runtime.install_commands(options.environments / name):
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
