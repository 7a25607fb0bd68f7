"""What coordinates cost in torch: patching, planning, a training step, eager inference, memory.

Plain and patched run alternately in one process; the figure is the ratio of medians.

    python benchmarks/training_and_eager.py --out benchmarks/results/training_and_eager.json
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

import coordconv_patch as ccp


class ConcatConv2d(nn.Conv2d):
    """The published form, for comparison: coordinates are concatenated to the input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        n, _, h, w = input.shape
        ys = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(n, 1, h, w)
        xs = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(n, 1, h, w)
        return super().forward(torch.cat((input, xs, ys), dim=1))


def concatenated(model: nn.Module) -> nn.Module:
    """A copy with every convolution replaced by the concatenating form (ungrouped models)."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if type(conv) is nn.Conv2d:
                wide = ConcatConv2d(
                    conv.in_channels + 2,
                    conv.out_channels,
                    conv.kernel_size,
                    conv.stride,
                    conv.padding,
                    conv.dilation,
                    bias=conv.bias is not None,
                )
                setattr(parent, name, wide)
    return model


class AddedMap(nn.Conv2d):
    """What keeping a map costs at least: its addition, without any check that it still holds."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
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


def alternate(actions: dict[str, Callable[[], Any]], repeats: int, title: str) -> dict[str, float]:
    """Median seconds of each action, run ``repeats`` times after one warm-up each.

    Every round takes the actions in another order: what ran just before leaves its mark on
    the processor's caches.
    """
    order = list(actions)
    shuffler = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in tqdm(range(repeats), desc=title, disable=None):
        shuffler.shuffle(order)
        for name in order:
            start = time.perf_counter()
            actions[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def trainer(model: nn.Module, batch: int, size: int) -> Callable[[], None]:
    """One SGD step on random data."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def inference(model: nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    model.eval()

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(images)

    return run


def variants(base: nn.Module) -> dict[str, nn.Module]:
    made = {"plain": copy.deepcopy(base)}
    made["first"] = ccp.patch(base, "first")
    made["all"] = ccp.patch(base, "all")
    for model in (made["first"], made["all"]):
        for weight in ccp.coord_parameters(model):
            nn.init.normal_(weight, std=1e-3)
    return made


def _peak_of(kind: str, threads: int) -> int:
    torch.set_num_threads(threads)
    base = timm.create_model("resnet50")
    model = concatenated(base) if kind == "concatenated" else variants(base)[kind]
    del base
    step = trainer(model, batch=8, size=160)
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(kind: str, threads: int) -> int:
    """Peak resident kB of three training steps in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of, (kind, threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    results: dict[str, dict[str, float]] = {}
    memory: dict[str, float] = {}
    if not options.skip_memory:
        # First, while this process is small: a child's peak counts from its parent's.
        kinds = tqdm(("plain", "first", "all", "concatenated"), desc="peak memory", disable=None)
        memory = {kind: peak_memory(kind, options.threads) for kind in kinds}
    base = timm.create_model("resnet50")
    image = torch.randn(1, 3, 224, 224)

    eager = copy.deepcopy(base).eval()
    results["making, resnet50"] = alternate(
        {
            "deepcopy": lambda: copy.deepcopy(eager),
            "patch all": lambda: ccp.patch(eager, "all"),
            "forward": inference(eager, image),
            "plan all": lambda: ccp.plan(eager, "all", example_inputs=image),
        },
        options.repeats,
        "patch and plan",
    )
    for batch, size in ((1, 224), (4, 224), (8, 224), (8, 160)):
        images = torch.randn(batch, 3, size, size)
        runs = {name: inference(m, images) for name, m in variants(base).items()}
        runs["all, addition alone"] = inference(addition_alone(base), images)
        runs["concatenated"] = inference(concatenated(base), images)
        results[f"eager inference, batch {batch}, {size} x {size}"] = alternate(
            runs, 2 * options.repeats, f"eager inference, batch {batch}, {size} x {size}"
        )
    steps = {name: trainer(m, 8, 160) for name, m in variants(base).items()}
    steps["concatenated"] = trainer(concatenated(base), 8, 160)
    results["training step, batch 8, 160 x 160"] = alternate(
        steps, options.repeats, "training step"
    )
    if memory:
        results["peak memory of training, kB"] = memory

    table = Table(title=f"resnet50, {options.threads} threads, ratio to the first of each group")
    for heading in ("what", "variant", "median", "ratio"):
        table.add_column(heading, no_wrap=True)
    for what, medians in results.items():
        first = next(iter(medians.values()))
        for name, value in medians.items():
            table.add_row(what, name, f"{value:.4g}", f"{value / first:.3f}")
    Console().print(table)
    if options.out:
        record = {
            "command": "python benchmarks/training_and_eager.py",
            "threads": options.threads,
            "repeats": options.repeats,
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "medians, seconds unless named otherwise": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
