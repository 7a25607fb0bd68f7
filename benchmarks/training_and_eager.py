"""What coordinates cost in torch: patching, a training step, memory, eager and compiled inference.

Plain, patched and ported models take turns in one process; the figure is the ratio of medians
to the plain model's. The floor adds a constant map after each convolution and checks nothing.

    python benchmarks/training_and_eager.py
"""

from __future__ import annotations

import argparse
import copy
import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch
from shared.models import MODELS, QUICK, BenchModel, images
from shared.ports import BufferCoords, RuntimeCoords, ported
from shared.processes import in_fresh_process, median_process
from shared.record import make_parser, open_record, ratios_of, timed
from shared.show import draw_ratios, print_ratios
from shared.variants import patched, patched_names, seeded
from torch import Tensor, nn

import coordconv_patch as ccp

NAME = "training_and_eager"
PLAIN, PORT = "plain", "all, port, buffer"
PROCESSES = 3
"""How many processes a figure of training or eager inference is the median of."""

Run = Callable[[], Any]


class AddedMap(nn.Conv2d):
    """What keeping a map costs at least: its addition, without any check that it still holds."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if not hasattr(self, "kept_map"):
            self.kept_map = torch.randn_like(output[:1])
        return output.add_(self.kept_map)


def addition_alone(model: nn.Module) -> nn.Module:
    """A copy whose convolutions add a constant map: the floor for eager inference."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = AddedMap
    return model


def variant(plain: nn.Module, name: str, example: Tensor) -> nn.Module:
    """A copy of a plain model in one of the forms that are compared."""
    if name == PLAIN:
        return copy.deepcopy(plain)
    if name in ("first", "all"):
        return patched(plain, name, example)
    if name == "all, folded":
        return ccp.fold(patched(plain, "all", example))
    if name == "all, floor":
        return addition_alone(plain)
    names = patched_names(patched(plain, "all", example))
    coords = RuntimeCoords if name == "all, port, run time" else BufferCoords
    return ported(plain, names, coords, example)


def trainer(model: nn.Module, batch: int, size: int) -> Run:
    """One SGD step on random data."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    shown = images(batch, size)
    with torch.no_grad():
        classes = model(shown).shape[1]
    labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(shown), labels).backward()
        optimizer.step()

    return step


def inference(model: nn.Module, shown: Tensor) -> Run:
    """One forward pass in evaluation mode."""
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return model(shown)

    return run


def _peak_of(kind: str, name: str, threads: int, size: int) -> int:
    torch.set_num_threads(threads)
    model = variant(seeded(MODELS[name].make), kind, images(1, size))
    step = trainer(model, batch=8, size=size)
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(name: str, threads: int, size: int) -> dict[str, Any]:
    """Peak resident memory of three training steps, each kind in a fresh process; in kB."""
    peaks: dict[str, int] = {}
    for kind in (PLAIN, "first", "all", PORT):
        peaks[kind] = in_fresh_process(_peak_of, kind, name, threads, size)
    return {
        "rounds": 1,
        "variants": {
            kind: {
                "kilobytes": peak,
                "ratio": peak / peaks[PLAIN],
                "ratio_95": [peak / peaks[PLAIN]] * 2,
            }
            for kind, peak in peaks.items()
        },
    }


def _measures(name: str, options: argparse.Namespace) -> dict[str, Callable[[str], Any]]:
    """What is measured of a model, by key."""
    model = MODELS[name]
    train_size = min(160, model.size)
    count = 1 if options.quick else PROCESSES
    found: dict[str, Callable[[str], Any]] = {}
    if not options.skip_memory:
        # First, while this process is small: a child's peak counts from its parent's.
        found["memory of training, batch 8"] = lambda key: peak_memory(
            name, options.threads, train_size
        )
    found[f"training step, batch 8, {train_size} px"] = lambda key: median_process(
        _training, name, train_size, options, key, processes=count
    )
    for batch, size in options.shapes or [(1, model.size), (4, model.size), (8, train_size)]:
        found[f"eager, batch {batch}, {size} px"] = lambda key, b=batch, s=size: median_process(
            _eager, name, b, s, options, key, processes=count
        )
    if not options.skip_compile:
        found[f"compiled, batch 4, {model.size} px"] = lambda key: _compiled(model, options, key)
    found["making"] = lambda key: in_fresh_process(_making, name, options, key)
    return {f"{name}, {what}": measure for what, measure in found.items()}


def _training(name: str, size: int, options: argparse.Namespace, key: str) -> Any:
    torch.set_num_threads(options.threads)
    plain, example = seeded(MODELS[name].make), images(1, size)
    kinds = (PLAIN, "first", "all", PORT, "all, port, run time")
    runs = {kind: trainer(variant(plain, kind, example), 8, size) for kind in kinds}
    return timed(runs, PLAIN, options, key)


def _eager(name: str, batch: int, size: int, options: argparse.Namespace, key: str) -> Any:
    torch.set_num_threads(options.threads)
    model = MODELS[name]
    plain, shown = seeded(model.make), images(batch, size)
    kinds = (*(PLAIN, "first", "all", "all, floor", "all, folded", PORT, "all, port, run time"),)
    runs = {kind: inference(variant(plain, kind, shown), shown) for kind in kinds}
    return timed(runs, PLAIN, options, key)


def _compiled(model: BenchModel, options: argparse.Namespace, key: str) -> Any:
    plain, shown = seeded(model.make), images(4, model.size)
    runs: dict[str, Run] = {}
    for kind in (PLAIN, "all", PORT):
        torch.compiler.reset()
        runs[kind] = inference(torch.compile(variant(plain, kind, shown).eval()), shown)
        runs[kind]()
    return timed(runs, PLAIN, options, key)


def _making(name: str, options: argparse.Namespace, key: str) -> Any:
    torch.set_num_threads(options.threads)
    model = MODELS[name]
    plain, shown = seeded(model.make), images(1, model.size)
    runs: dict[str, Run] = {
        "forward": inference(plain, shown),
        "deepcopy": lambda: copy.deepcopy(plain),
        "patch all": lambda: ccp.patch(plain, "all"),
        "plan all": lambda: ccp.plan(plain, "all", example_inputs=shown),
    }
    return timed(runs, "deepcopy", options, key)


def _shape(text: str) -> tuple[int, int]:
    batch, _, size = text.partition("x")
    return int(batch), int(size)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__ or "", ("resnet50", "mobilenetv3"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="BATCHxSIZE")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-compile", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.skip_memory, options.skip_compile = [QUICK], True, True
        options.shapes = [(1, MODELS[QUICK].size)]
    torch.set_num_threads(options.threads)
    record = open_record(options, NAME)
    for name in [] if options.show else options.models:
        for key, measure in _measures(name, options).items():
            record.measure(key, measure, key)
    ratios = {key: ratios_of(result) for key, result in record.results.items()}
    print_ratios(ratios)
    panels: dict[str, dict[str, Any]] = {}
    for key, row in ratios.items():
        name, what = key.split(", ", 1)
        if what != "making":
            shown = {kind: ratio for kind, ratio in row.items() if kind != PLAIN}
            panels.setdefault(MODELS[name].title, {})[what] = shown
    draw_ratios(panels, "Time and memory in torch over the plain model's", options.picture)


if __name__ == "__main__":
    main()
