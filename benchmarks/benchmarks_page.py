"""Write docs/benchmarks.md: what the records in ``results/`` say.

python benchmarks/benchmarks_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["PAGE", "render"]

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

_TITLES = {
    "resnet50": "ResNet-50",
    "mobilenetv3": "MobileNetV3-Large",
    "lite0": "EfficientNet-Lite0",
    "convnext": "ConvNeXt-Tiny",
    "yolo11n": "YOLO11n",
    "retinanet": "RetinaNet-R50",
}

_HEADER = """# Benchmarks

Every figure on this page is read from the records in
[benchmarks/results/](../benchmarks/results/), which `python benchmarks/benchmarks_page.py` does.
They are ratios of medians to the plain model in the same run, with the variants taking turns in
random order; below 1 means faster than plain. "Concatenated" is the usual CoordConv layer with
its coordinates in buffers.
"""

_ONNX = """## Exported files in ONNX Runtime, on the CPU

The *floor* is the plain model with a constant map added inside each convolution, in the layout
that the kernels compute in: what any file must cost at least that adds one to each. A
concatenating model loses more than its arithmetic: its concatenations leave that layout, and
depthwise convolutions with further channels leave the fast kernels.
"""

_SIZES = """## Size of exported files

With every convolution patched. Most of the growth is the coordinate weights themselves, which are
many beside those of a narrow or depthwise convolution.
"""

_OPENVINO = """## OpenVINO

Exported with `lowering="branch"`, two threads, every convolution patched.
"""

_TORCH = """## In torch: timm's ResNet-50

In eager inference on the CPU a layer keeps its map as long as the values of the coordinate weight
do not change; they are compared at every call, so the map is never stale. The floor is a model
that adds a constant map after each convolution and checks nothing.
"""

_FUNCTIONAL = """## Convolutions that are called as functions

One `F.conv2d`, 3x3, 64 channels on 64 x 64, batch 1, one thread; "compiled" is `torch.compile`. The
floor adds a constant map.
"""

_MAKING = """## Patching itself

Beside `copy.deepcopy` of the model.
"""

_EXPORT = """## What an export costs

With its verification, every convolution patched, beside `torch.onnx.export` of the plain model
and one load of it.
"""

_PLACES = """## Files that are told places

Exported with `places=True`, and given another place for each image: coordinates are computed from
them at every run, and not kept as constants.
"""

_SCALING = """## How the cost grows

ResNet-50 in ONNX Runtime, by the number of patched convolutions, the image size, and the batch.

![The cost by convolutions, resolution and batch](../benchmarks/results/scaling.png)
"""

_GPU = """## On a GPU

What `python benchmarks/on_gpu.py` measures. float32 is as torch computes it by default there, with
convolutions in TF32; "AMP" is autocast to bfloat16. "Lowerings" are the forms that an exported
graph can have, as torch runs them; provider names mean ONNX Runtime.
"""

_NO_GPU = """## On a GPU

Nothing on this page was run on a GPU: there is no record of one. If you have one, please run
`python benchmarks/on_gpu.py`; it takes under 8 minutes, and
[CONTRIBUTING.md](../CONTRIBUTING.md) says how to send what it writes.
"""


def record(name: str) -> dict[str, Any]:
    """A record."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; its first column is text, the others are numbers."""
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def ratios(result: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The ratios of variants, two digits; a dash where one was not measured."""
    variants = result["variants"]
    return [f"{variants[name]['ratio']:.2f}" if name in variants else "–" for name in names]


def _onnx_runtime(results: Mapping[str, Any]) -> str:
    names = ("first", "k>1", "all", "all, floor", "all, port, buffer")
    rows = [
        [
            f"{title}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}",
            *ratios(results[f"{model}, onnxruntime, batch {batch}, threads {threads}"], names),
        ]
        for model, title in _TITLES.items()
        for batch in (1, 4)
        for threads in (1, 2)
    ]
    headings = ("model", "first conv", "larger than 1×1", "every", "floor", "concat.")
    noise = [
        result["variants"]["plain again"]["ratio"]
        for key, result in results.items()
        if "onnxruntime" in key
    ]
    return (
        f"{_ONNX}\n{table(headings, rows)}\nThe plain file loaded twice took {min(noise):.2f} to "
        f"{max(noise):.2f} of itself: differences of that size mean nothing.\n"
    )


def _sizes(results: Mapping[str, Any]) -> str:
    rows = []
    for model, title in _TITLES.items():
        variants = results[f"{model}, onnxruntime, batch 1, threads 1"]["variants"]
        plain, patched = (variants[name]["file_size"] for name in ("plain", "all"))
        rows.append([title, f"{plain / 1e6:.1f} MB", f"+{patched / plain - 1:.1%}"])
    return f"{_SIZES}\n{table(('model', 'plain', 'growth'), rows)}"


def _openvino(results: Mapping[str, Any]) -> str:
    names = ("all", "all, port, buffer")
    rows = [
        [
            f"{title}, batch {batch}",
            *ratios(results[f"{model}, openvino, batch {batch}, threads 2"], names),
        ]
        for model, title in _TITLES.items()
        for batch in (1, 4)
    ]
    return f"{_OPENVINO}\n{table(('model', 'every', 'concatenated'), rows)}"


def _in_torch(results: Mapping[str, Any]) -> str:
    names = ("first", "all", "all, floor", "all, folded", "all, port, buffer")
    rows = [
        [key.removeprefix("resnet50, "), *ratios(result, names)]
        for key, result in results.items()
        if not key.endswith("making")
    ]
    headings = ("", "first conv", "every", "floor", "every, folded", "concatenated")
    making = results["resnet50, making"]["variants"]
    ones = {
        "patch all": "`patch`",
        "plan all": "`plan` with example inputs",
        "forward": "a forward",
    }
    costs = [[title, f"{making[name]['ratio']:.2f}"] for name, title in ones.items()]
    return f"{_TORCH}\n{table(headings, rows)}\n{_MAKING}\n{table(('', 'ratio'), costs)}"


def _functional(results: Mapping[str, Any]) -> str:
    rows = [
        [key, *ratios(result, ("plain again", "all", "floor"))] for key, result in results.items()
    ]
    return f"{_FUNCTIONAL}\n{table(('', 'plain again', 'with coordinates', 'floor'), rows)}"


def _export_cost(results: Mapping[str, Any]) -> str:
    rows = [[_TITLES[model], *ratios(result, ("all",))] for model, result in results.items()]
    return f"{_EXPORT}\n{table(('model', 'export and verification'), rows)}"


def _places(results: Mapping[str, Any]) -> str:
    names = ("plain again", "first", "first, places", "all", "all, places")
    rows = []
    for key, result in results.items():
        model, _, rest = key.partition(", ")
        rows.append([f"{_TITLES[model]}, {rest}", *ratios(result, names)])
    headings = ("model", "plain again", "first conv", "with places", "every", "with places")
    return f"{_PLACES}\n{table(headings, rows)}"


def _scaling(results: Mapping[str, Any]) -> str:
    rows = [
        [key.removeprefix("resnet50, "), *ratios(result, ("patched", "port, buffer"))]
        for key, result in results.items()
    ]
    return f"{_SCALING}\n{table(('', 'patched', 'concatenated'), rows)}"


def on_gpu(results: Mapping[str, Any] | None) -> str:
    """The section about GPUs; ``None``: there is no record."""
    if results is None:
        return _NO_GPU
    checks = {key: r["passed"] for key, r in results.items() if "passed" in r}
    failed = [key.removeprefix("check, ") for key, passed in checks.items() if not passed]
    said = f"{len(checks) - len(failed)} of {len(checks)} checks passed"
    lines = [said + (f"; **failed**: {', '.join(failed)}." if failed else ".")]
    timed = {key: result for key, result in results.items() if "variants" in result}
    forms = {key: result for key, result in timed.items() if "map" in result["variants"]}
    names = ("first", "all", "all, floor", "all, folded", "all, port, buffer")
    rows = [[key, *ratios(result, names)] for key, result in timed.items() if key not in forms]
    headings = ("", "first conv", "every", "floor", "every, folded", "concatenated")
    of_forms = ("auto", "channels", "map", "branch", "separable", "computed")
    form_rows = []
    for key, result in forms.items():
        port = "naive concat" if "naive concat" in result["variants"] else "all, port, buffer"
        form_rows.append([key, *ratios(result, (*of_forms, port))])
    tables = [table(headings, rows), table(("every conv.", *of_forms, "concat."), form_rows)]
    missing = [f"- not run: {key}: {r['not_run']}" for key, r in results.items() if "not_run" in r]
    parts = [_GPU, *lines, "", *tables, *missing]
    return "\n".join(parts) + ("\n" if missing else "")


def _machines(names: Iterable[str]) -> str:
    lines = []
    for name in names:
        machine = record(name)["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        gpus = "".join(f", {gpu}" for gpu in machine["gpus"])
        lines.append(
            f"- {name}: {machine['processor']}, {machine['cores']} cores{gpus}, "
            f"{machine['system']}; {versions}\n"
            + "".join(f"    - `{command}`\n" for command in record(name)["commands"])
        )
    return "## Where and how it was measured\n\n" + "".join(lines)


def render() -> str:
    """The page."""
    onnx = record("onnx_runtime")["results"]
    measured = [
        "onnx_runtime",
        "places",
        "training_and_eager",
        "functional",
        "export_cost",
        "scaling",
    ]
    has_gpu = (RESULTS / "on_gpu.json").is_file()
    return "\n".join(
        (
            _HEADER,
            _onnx_runtime(onnx),
            _sizes(onnx),
            _places(record("places")["results"]),
            _openvino(onnx),
            _in_torch(record("training_and_eager")["results"]),
            _functional(record("functional")["results"]),
            _export_cost(record("export_cost")["results"]),
            _scaling(record("scaling")["results"]),
            on_gpu(record("on_gpu")["results"] if has_gpu else None),
            _machines([*measured, "on_gpu"] if has_gpu else measured),
        )
    )


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
