"""What holds and what coordinates cost on a GPU: one command, under 8 minutes, without network.

Checks first, then times: a training step, eager and compiled inference, ONNX Runtime's CUDA and
TensorRT providers where they load, and each lowering as torch runs it, beside the plain model
and the concatenating one, in several precisions. What fails or no longer fits into the time is
recorded as not run, with the reason; called again, the script measures that alone.

    python benchmarks/on_gpu.py
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from shared.device_checks import CHECKS
from shared.models import MODELS, QUICK, BenchModel
from shared.parts import Part, TimeLeft, measure_parts, reason_not_run
from shared.record import make_parser, open_record, ratios_of, timed
from shared.settings import Setting, inference_run, training_run
from shared.show import print_ratios
from shared.variants import patched, seeded
from torch import nn
from training_and_eager import PLAIN, PORT, variant

from coordconv_patch.errors import first_line
from coordconv_patch.lowering.lower import lower_
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.packages import require_packages

NAME = "on_gpu"
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
MINUTES = 7.0
"""After which no part goes on: the rest of the 8 is for the start, and writing the record."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__ or "", ("resnet50",))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.set_defaults(seconds=4.0)
    options = parser.parse_args(arguments)
    left = TimeLeft(60 * options.minutes)
    if options.quick:
        options.models = [QUICK]
    elif options.device == "cpu":
        parser.error("--device cpu only tries the script out: add --quick")
    if not options.show and options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "There is no GPU here (torch.cuda.is_available() is False): nothing was measured or "
            "written. To try the script out: python benchmarks/on_gpu.py --device cpu --quick"
        )
    record = open_record(options, NAME)
    if not options.show:
        measure_parts(record, _parts(options), left)
    _print(record.results)
    if any(result.get("passed") is False for result in record.results.values()):
        raise SystemExit(1)


def _parts(options: argparse.Namespace) -> list[Part]:
    """All parts, the most important ones first."""
    device = torch.device(options.device)
    parts = [
        Part(f"check, {name}", 20, functools.partial(_check, check, device))
        for name, check in CHECKS.items()
    ]
    for name in options.models:
        parts += _parts_of(name, options, device)
    if options.quick:
        parts = [Part(part.key, 0, part.run) for part in parts]
    return parts


def _parts_of(name: str, options: argparse.Namespace, device: torch.device) -> list[Part]:
    """The parts of a model; seconds are estimates for ResNet-50 and an H100 or H200."""
    single = Setting(device)
    amp = Setting(device, autocast=torch.bfloat16)
    amp_last = Setting(device, autocast=torch.bfloat16, channels_last=True)
    half = Setting(device, torch.float16)
    half_last = Setting(device, torch.float16, channels_last=True)
    batch = 2 if options.quick else 32
    parts: list[Part] = []

    def add(seconds: float, what: str, measure: Callable[..., Any], *given: Any) -> None:
        key = f"{name}, {what}"
        run = functools.partial(measure, MODELS[name], *given, options, key)
        parts.append(Part(key, seconds, run))

    for setting in (single, amp, amp_last):
        what = f"training step, batch {batch}, {setting.title}"
        add(20, what, _training, setting, batch)
    for setting in (single, amp, amp_last, half_last):
        add(20, f"eager, batch {batch}, {setting.title}", _eager, setting, batch)
    for setting in (single, half):
        add(20, f"eager, batch 1, {setting.title}", _eager, setting, 1)
    add(90, f"compiled, batch {batch}, {single.title}", _compiled, single, batch)
    runtime = (CUDA, TENSORRT) if device.type == "cuda" else (CPU, TENSORRT)
    add(100, f"{runtime[0]}, batch {batch}", _in_onnx_runtime, runtime[0], batch)
    for setting in (single, half):
        add(20, f"lowerings, batch {batch}, {setting.title}", _lowerings, setting, batch)
    add(90, f"compiled, batch {batch}, {amp_last.title}", _compiled, amp_last, batch)
    add(120, f"{runtime[1]}, batch {batch}", _in_onnx_runtime, runtime[1], batch)
    return parts


def _check(check: Callable[[torch.device], None], device: torch.device) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        check(device)
    except Exception as error:
        return {"passed": False, "reason": first_line(error)}
    return {"passed": True, "seconds": time.perf_counter() - start}


def _variants(model: BenchModel, kinds: Sequence[str], setting: Setting) -> dict[str, nn.Module]:
    """Models at the setting, in evaluation mode."""
    plain, example = seeded(model.make), Setting(torch.device("cpu")).images(1, model.size)
    return {kind: setting.put(variant(plain, kind, example)) for kind in kinds}


def _training(
    model: BenchModel, setting: Setting, batch: int, options: argparse.Namespace, key: str
) -> dict[str, Any]:
    models = _variants(model, (PLAIN, "first", "all", PORT), setting)
    runs = {k: training_run(made, setting, batch, model.size) for k, made in models.items()}
    return timed(runs, PLAIN, options, key)


def _eager(
    model: BenchModel, setting: Setting, batch: int, options: argparse.Namespace, key: str
) -> dict[str, Any]:
    kinds = (PLAIN, "first", "all", "all, floor", "all, folded", PORT)
    return _timed_inference(_variants(model, kinds, setting), model, setting, batch, options, key)


def _compiled(
    model: BenchModel, setting: Setting, batch: int, options: argparse.Namespace, key: str
) -> dict[str, Any]:
    compiled: dict[str, nn.Module] = {}
    shown = setting.images(batch, model.size)
    # Inductor's C++ takes a minute to compile: too long for a try.
    backend = "aot_eager" if options.quick else "inductor"
    kinds = (PLAIN, "all") if options.quick else (PLAIN, "first", "all", PORT)
    torch.compiler.reset()  # once: later it would throw away what the variants before got
    for kind, made in _variants(model, kinds, setting).items():
        compiled[kind] = torch.compile(made, backend=backend)
        inference_run(compiled[kind], setting, shown)()
    return _timed_inference(compiled, model, setting, batch, options, key)


def _lowerings(
    model: BenchModel, setting: Setting, batch: int, options: argparse.Namespace, key: str
) -> dict[str, Any]:
    """Each form of the branch as torch runs it, which needs no ONNX Runtime."""
    models = _variants(model, (PLAIN, PORT), setting)
    example = Setting(torch.device("cpu")).images(1, model.size)
    everywhere = setting.put(patched(seeded(model.make), "all", example))
    for name in LOWERINGS:
        models[name] = copy.deepcopy(everywhere)
        with torch.no_grad():
            lower_(models[name], setting.images(1, model.size), lambda _, name=name: name)
    return _timed_inference(models, model, setting, batch, options, key)


def _timed_inference(
    models: dict[str, nn.Module],
    model: BenchModel,
    setting: Setting,
    batch: int,
    options: argparse.Namespace,
    key: str,
) -> dict[str, Any]:
    shown = setting.images(batch, model.size)
    runs = {kind: inference_run(made, setting, shown) for kind, made in models.items()}
    return timed(runs, PLAIN, options, key)


def _in_onnx_runtime(
    model: BenchModel, provider: str, batch: int, options: argparse.Namespace, key: str
) -> dict[str, Any]:
    """Every lowering's file beside the plain and the concatenating one; in TensorRT two's."""
    require_packages("a file", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    # Imported here: without these packages all other parts run.
    from coordconv_patch.bench.bench import bench_onnx
    from coordconv_patch.runtime.providers import working_providers

    working_providers([provider])
    example = Setting(torch.device("cpu")).images(batch, model.size)
    made = patched(seeded(model.make), "all", example)
    # TensorRT builds an engine for each file, which takes long.
    lowerings = ("map", "branch") if provider == TENSORRT else ("auto", *LOWERINGS)
    if options.quick:
        lowerings = ("map",)
    repeats = 2 if options.quick else 40
    report = bench_onnx(made, example, lowerings=lowerings, providers=[provider], repeats=repeats)
    measured = report.to_dict()
    (group,) = measured["groups"]
    return {
        "rounds": measured["repeats"],
        "notes": measured["notes"],
        "variants": group["variants"],
    }


def _print(results: dict[str, Any]) -> None:
    print_ratios({key: ratios_of(r) for key, r in results.items() if "variants" in r})
    for key, result in results.items():
        if "passed" in result:
            print(f"{key}: {'passed' if result['passed'] else 'FAILED: ' + result['reason']}")
        elif reason_not_run(result):
            print(f"{key}: not run: {reason_not_run(result)}")


if __name__ == "__main__":
    main()
