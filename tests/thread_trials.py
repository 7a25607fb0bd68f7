"""Operations done in eight threads at a time, each checked against the same one done alone.

One kind, a thousand times: ``python tests/thread_trials.py patch 1000``; all: ``... all 1000``.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import coordconv_patch as ccp

THREADS = 8

Trial = Callable[[int], bool]
"""Does an operation for the n-th time; returns whether the result was right."""


class Twice(nn.Module):
    """One convolution called twice, the second time with coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


class Nested(nn.Module):
    """A caller that calls itself between its two calls of the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        x = self.conv(x)
        if depth:
            x = self(x, depth - 1)
        return self.conv(x)


class Branching(nn.Module):
    """Cannot be traced symbolically: it looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if x.sum() > -1e9 else self.first(x)


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Conv2d(4, 2, 1),
    ).eval()


def trained(model: nn.Module) -> nn.Module:
    """The model with coordinate weights that are not zero, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def pictures(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 3, size, size + 1, generator=generator) for size in sizes]


def chosen_calls() -> Trial:
    inputs = pictures(16, 33, 64)
    torch.manual_seed(0)
    model = trained(ccp.patch(Twice().eval(), "conv@1", example_inputs=inputs[0]))
    wanted = [model(x) for x in inputs]
    return lambda n: torch.equal(model(inputs[n % 3]), wanted[n % 3])


def nested_callers() -> Trial:
    torch.manual_seed(0)
    net, (x,) = Nested().eval(), pictures(16)
    model = trained(ccp.patch(net, "conv@1", example_inputs=x))
    wanted = [model(x, depth) for depth in range(4)]
    assert not torch.equal(wanted[1], net(x, 1))
    return lambda n: torch.equal(model(x, n % 4), wanted[n % 4])


def failing_callers() -> Trial:
    """Forwards that fail between the calls leave nothing behind."""
    right = chosen_calls()
    torch.manual_seed(0)
    model = trained(ccp.patch(Twice().eval(), "conv@1", example_inputs=pictures(16)[0]))

    def trial(n: int) -> bool:
        try:
            model(torch.zeros(1, 5, 8, 8))
        except RuntimeError:
            return right(n)
        return False

    return trial


def kept_maps() -> Trial:
    inputs = pictures(*range(4, 16))  # more sizes than are kept
    model = trained(ccp.patch(plain_net(), "all"))

    def trial(n: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(inputs[n % 12]), wanted[n % 12])

    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    return trial


def plans() -> Trial:
    net, (x,) = plain_net(), pictures(16)
    wanted = str(ccp.plan(net, "all", example_inputs=x))
    return lambda n: str(ccp.plan(net, "all", example_inputs=x)) == wanted


def patches() -> Trial:
    """Of one model, which every thread patches."""
    net, (x,) = plain_net(), pictures(16)
    net.train()
    wanted = net.eval()(x)
    net.train()

    def trial(n: int) -> bool:
        model = ccp.patch(net, "all" if n % 2 else "first", example_inputs=x if n % 3 else None)
        layers = ["0", "3.0", "4"] if n % 2 else ["0"]
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        patched = [name for name, m in model.named_modules() if hasattr(m, "coord_weight")]
        modes = all(module.training for module in model.modules())
        return patched == layers and modes and not hooks and torch.equal(model.eval()(x), wanted)

    return trial


def untraceable_patches() -> Trial:
    torch.manual_seed(0)
    net, (x,) = Branching().eval(), pictures(16)

    def trial(n: int) -> bool:
        model = ccp.patch(net, "first", example_inputs=x)
        patched = [name for name, m in model.named_modules() if hasattr(m, "coord_weight")]
        return patched == ["first"] and torch.equal(model(x), net(x))

    return trial


def patches_in_place() -> Trial:
    """And the way back."""
    (x,) = pictures(16)
    wanted = plain_net()(x)
    nets = [plain_net() for _ in range(THREADS)]

    def trial(n: int) -> bool:
        net = copy.deepcopy(nets[n % THREADS])
        there = torch.equal(ccp.patch_(net, "all")(x), wanted)
        back = ccp.unpatch_(net)
        return there and type(back[0]) is nn.Conv2d and torch.equal(back(x), wanted)

    return trial


def folds() -> Trial:
    model, (x,) = trained(ccp.patch(plain_net(), "all")), pictures(16)
    wanted = ccp.fold(model)(x)
    return lambda n: torch.equal(ccp.fold(model)(x), wanted)


def foreign_folds() -> Trial:
    """By torch's own function, which traces."""
    model, (x,) = trained(ccp.patch(plain_net(), "all")), pictures(16)
    wanted = ccp.fold_with(model, fuse)(x)
    return lambda n: torch.equal(ccp.fold_with(model, fuse)(x), wanted)


def loads() -> Trial:
    """And saves, each to a file of its own."""
    net, (x,) = plain_net(), pictures(16)
    model = trained(ccp.patch(net, "all"))
    wanted = model(x)
    folder = tempfile.TemporaryDirectory()

    def trial(n: int) -> bool:
        path = Path(folder.name, f"{n}.safetensors")
        ccp.save_coords(model, path)
        loaded = ccp.load_coords(net, path)
        path.unlink()
        return torch.equal(loaded(x), wanted)

    return trial


def exports() -> Trial:
    model, (x,) = trained(ccp.patch(plain_net(), "all")), pictures(8)
    folder = tempfile.TemporaryDirectory()

    def trial(n: int) -> bool:
        path = Path(folder.name, f"{n}.onnx")
        exporter = "dynamo" if n % 2 else "torchscript"
        report = ccp.export_onnx(model, path, x, exporter=exporter, dynamic_batch=False)
        path.unlink()
        return all(check.agrees for check in report.checks)

    return trial


def providers() -> Trial:
    from coordconv_patch.runtime import providers as module

    works = module._works.__wrapped__
    return lambda n: works("CPUExecutionProvider")


def unlike_windows() -> Trial:
    """A thread that moves a layer's window makes the others' maps out of date."""
    (x,) = pictures(16)
    model = trained(ccp.patch(plain_net(), "first"))
    windows = [ccp.Window((8 * k, 0), (16, 17), (64, 64)) for k in range(3)]
    with torch.no_grad():
        wanted = [ccp.set_window_(model, window)(x) for window in windows]
    moving = threading.Lock()

    def trial(n: int) -> bool:
        with torch.no_grad():
            if n % 4:
                output = model(x)
                return any(torch.equal(output, each) for each in wanted)
            with moving:
                ccp.set_window_(model, windows[n % 3])
                return torch.equal(model(x), wanted[n % 3])

    return trial


TRIALS: dict[str, Callable[[], Trial]] = {
    function.__name__: function
    for function in (
        *(chosen_calls, nested_callers, failing_callers, kept_maps, unlike_windows),
        *(plans, patches, untraceable_patches, patches_in_place, folds, foreign_folds, loads),
        *(providers, exports),
    )
}


@dataclasses.dataclass
class Outcome:
    """What came of many operations."""

    wrong: int = 0
    failed: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)

    def add(self, operation: Callable[[], bool]) -> None:
        try:
            self.wrong += not operation()
        except Exception as error:
            self.failed += 1
            self.errors.append(f"{type(error).__name__}: {str(error)[:200]}")


def run(trial: Trial, count: int, threads: int = THREADS) -> Outcome:
    """An operation ``count`` times in several threads."""
    outcome = Outcome()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda n: outcome.add(lambda: trial(n)), range(count)))
    return outcome


@contextmanager
def serving(forward: Callable[[], Tensor]) -> Iterator[Outcome]:
    """Another thread that goes on calling a model, and compares what it gives."""
    outcome, stop, wanted = Outcome(), threading.Event(), forward()
    counted = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            outcome.add(lambda: torch.equal(forward(), wanted))
            counted.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert counted.wait(60)
        yield outcome
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    names = TRIALS if sys.argv[1] == "all" else [sys.argv[1]]
    x = torch.zeros(1, 3, 16, 16)
    for name in names:
        trial = TRIALS[name]()
        served = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        forwards = [0]

        def forward(served: nn.Module = served, forwards: list[int] = forwards) -> Tensor:
            forwards[0] += 1
            return served(x)

        with serving(forward) as others:
            outcome = run(trial, int(sys.argv[2]))
        print(
            f"{name}: {outcome.wrong} wrong and {outcome.failed} failed of {sys.argv[2]}; "
            f"unrelated forwards: {others.wrong} wrong and {others.failed} failed of "
            f"{forwards[0]}",
            *sorted(set(outcome.errors))[:2],
            sep="\n    ",
            flush=True,
        )
