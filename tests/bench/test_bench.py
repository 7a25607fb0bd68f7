"""Benchmarks of exported files: what is timed, how ratios are made, what is printed."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from concat_model import concatenating
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.bench import bench
from coordconv_patch.bench.bench import bench_onnx
from coordconv_patch.bench.machine import describe_machine
from coordconv_patch.bench.naive import export_naive
from coordconv_patch.bench.picture import draw_bench
from coordconv_patch.bench.report import (
    BenchGroup,
    BenchReport,
    BenchRow,
    markdown_table,
)
from coordconv_patch.errors import ArgumentError, ExportError, MissingPackageError, PatchError
from coordconv_patch.export.auto_lowering import accepted_lowerings
from coordconv_patch.files.picture_file import check_picture
from coordconv_patch.lowering.registry import LOWERINGS
from coordconv_patch.runtime.binding import BoundRun, device_of
from coordconv_patch.runtime.providers import CPU, make_session
from coordconv_patch.runtime.timing import Ratio, alternate, median, ratio_of_medians

CPU_ONLY = [CPU]


class Net(nn.Module):
    """A stem, a residual depthwise block and a 1x1, each with its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        return self.point((self.bn2(self.depthwise(x)) + x).relu())


def patched(where: Any = "all") -> nn.Module:
    torch.manual_seed(0)
    model = ccp.patch(Net().eval(), where, example_inputs=images(1))
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_(std=0.3)
        for name in ("bn1", "bn2"):
            norm = model.get_submodule(name)
            norm.running_mean.normal_(std=0.5)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 2)
    return model


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, 12, 16, generator=torch.Generator().manual_seed(1))


# --- timing -------------------------------------------------------------------------------------


def test_actions_take_turns_and_every_round_has_its_own_order() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = alternate(runs, repeats=20, warm_up=2)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 20)
    rounds = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 22, "warm-up rounds run, but do not count"
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3


def test_each_time_belongs_to_its_action() -> None:
    runs = {"short": lambda: None, "long": lambda: time.sleep(0.005)}
    seconds = alternate(runs, repeats=5)
    assert min(seconds["long"]) >= 0.005 > max(seconds["short"])


@pytest.mark.parametrize(("runs", "repeats"), [({}, 3), ({"a": list}, 0)])
def test_nothing_to_time_is_an_error(runs: dict[str, Callable[[], Any]], repeats: int) -> None:
    with pytest.raises(ArgumentError, match="at least one action and one repeat"):
        alternate(runs, repeats=repeats)


def test_a_ratio_is_that_of_the_medians_whatever_single_rounds_did() -> None:
    ratio = ratio_of_medians([2.0, 2.0, 2.0, 2.0, 90.0], [1.0, 50.0, 1.0, 1.0, 1.0])
    assert ratio.value == 2.0
    assert ratio.low <= 2.0 <= ratio.high


def test_the_interval_covers_the_true_ratio_in_about_95_of_100_runs() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        base = generator.normal(1.0, 0.02, 41)
        ratio = ratio_of_medians(list(generator.normal(1.1, 0.02, 41)), list(base))
        covered += ratio.low <= 1.1 <= ratio.high
    assert 180 <= covered <= 199


def test_drift_that_hits_both_alike_does_not_widen_the_interval() -> None:
    """The rounds are drawn together; drawn apart, the interval is several times as wide."""
    drift = np.linspace(1, 3, 60)
    noise = np.random.default_rng(0).normal(1.0, 0.001, 60)
    ratio = ratio_of_medians(list(drift * noise), list(drift))
    assert ratio.unlike_one < 0.005


def test_rounds_of_different_runs_are_refused() -> None:
    with pytest.raises(ArgumentError, match="3 rounds against 2"):
        ratio_of_medians([1.0, 1.0, 1.0], [1.0, 1.0])


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [4.0, 1.0, 2.0, 9.0]])
def test_the_median_is_pythons(values: list[float]) -> None:
    assert median(values) == statistics.median(values)


# --- running a session --------------------------------------------------------------------------


def test_a_bound_run_gives_what_the_session_gives_and_keeps_its_outputs(tmp_path: Path) -> None:
    path = tmp_path / "n.onnx"
    ccp.export_onnx(patched(), path, images(2), providers=CPU_ONLY)
    session = make_session(path, CPU_ONLY, threads=1, rests_between_runs=True)
    image = images(5).numpy()
    run = BoundRun(session, [image])
    (first,) = run.outputs()
    np.testing.assert_array_equal(first, session.run(None, {"x": image})[0])
    place = first.__array_interface__["data"][0]
    first[:] = 0
    run()
    (again,) = run.outputs()
    assert again.__array_interface__["data"][0] == place
    np.testing.assert_array_equal(again, session.run(None, {"x": image})[0])


def test_a_bound_run_refuses_what_the_graph_does_not_take(tmp_path: Path) -> None:
    path = tmp_path / "n.onnx"
    ccp.export_onnx(patched(), path, images(2), providers=CPU_ONLY)
    session = make_session(path, CPU_ONLY)
    with pytest.raises(ExportError, match=r"inputs \['x'\], but 2 arrays"):
        BoundRun(session, [images(1).numpy()] * 2)
    with pytest.raises(ExportError, match=r"cannot run the graph on .*\(1, 3, 12, 15\)"):
        BoundRun(session, [images(1).numpy()[..., :15]])


@pytest.mark.parametrize(
    ("provider", "device"),
    [(CPU, "cpu"), ("CUDAExecutionProvider", "cuda"), ("TensorrtExecutionProvider", "cuda")],
)
def test_values_are_bound_where_the_provider_computes(provider: str, device: str) -> None:
    assert device_of(provider) == device


class _Recorder:
    """Writes down each call of its methods; those named in ``answers`` return something."""

    def __init__(self, log: list[Any], **answers: Any) -> None:
        self.log = log
        self.answers = answers

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in self.answers:
            return lambda: self.answers[name]
        return lambda *values: self.log.append((name, *values))


def test_on_a_gpu_inputs_and_outputs_are_bound_there_and_runs_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def value(array: Any, device: str, number: int) -> str:
        return f"x on {device} {number}"

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", staticmethod(value))
    log: list[Any] = []
    binding = _Recorder(log, get_outputs=["y on the device"])
    session: Any = _Recorder(
        log,
        get_inputs=[SimpleNamespace(name="x")],
        get_outputs=[SimpleNamespace(name="y")],
        get_providers=["CUDAExecutionProvider", CPU],
        io_binding=binding,
    )
    run = BoundRun(session, [images(1).numpy()])
    once = [("synchronize_inputs",), ("run_with_iobinding", binding), ("synchronize_outputs",)]
    assert log == [
        ("bind_ortvalue_input", "x", "x on cuda 0"),
        ("bind_output", "y", "cuda", 0),
        *once,
        ("bind_ortvalue_output", "y", "y on the device"),
    ]
    log.clear()
    run()
    assert log == once


# --- the naive form -----------------------------------------------------------------------------


def test_the_naive_file_is_the_concatenating_model(tmp_path: Path) -> None:
    model = patched()
    size = export_naive(model, tmp_path / "n.onnx", images(2), providers=CPU_ONLY)
    assert size == (tmp_path / "n.onnx").stat().st_size
    for batch in (1, 3):
        expected = concatenating(model)(images(batch)).detach().numpy()
        session = make_session(tmp_path / "n.onnx", CPU_ONLY)
        (found,) = session.run(None, {"x": images(batch).numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_naive_graph_widens_every_convolution_and_adds_nothing(tmp_path: Path) -> None:
    export_naive(patched(), tmp_path / "n.onnx", images(2), providers=CPU_ONLY)
    session_path = tmp_path / "optimised.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(session_path)
    ort.InferenceSession(str(tmp_path / "n.onnx"), options, providers=CPU_ONLY)
    graph = onnx.load(session_path).graph
    shapes = {value.name: list(value.dims) for value in graph.initializer}
    weights = [shapes[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    assert sorted(weights) == [[4, 10, 1, 1], [8, 3, 3, 3], [8, 5, 3, 3]]
    operators = [node.op_type for node in graph.node]
    assert operators.count("Conv") == 3
    assert operators.count("Concat") >= 3
    assert operators.count("Add") == 1, "the residual's alone"


def test_the_naive_form_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = patched()
    before = model(images(3))
    names = list(model.state_dict())
    export_naive(model, tmp_path / "n.onnx", images(2), providers=CPU_ONLY)
    assert torch.equal(model(images(3)), before)
    assert list(model.state_dict()) == names


# --- the benchmark ------------------------------------------------------------------------------


def leave_autotune_out(patch: pytest.MonkeyPatch) -> None:
    """Take all lowerings but the one that times dozens of files itself."""
    quick = tuple(name for name in accepted_lowerings() if name != "autotune")
    patch.setattr(bench, "accepted_lowerings", lambda: quick)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    with pytest.MonkeyPatch.context() as patch:
        leave_autotune_out(patch)
        return bench_onnx(
            patched(), images(2), providers=CPU_ONLY, batches=(1, 3), threads=(1, 2), repeats=3
        )


def test_every_combination_has_every_variant(report: BenchReport) -> None:
    combinations = [(group.provider, group.batch, group.threads) for group in report.groups]
    assert combinations == [(CPU, *pair) for pair in itertools.product((1, 3), (1, 2))]
    for group in report.groups:
        names = [row.name for row in group.rows]
        assert names[:2] == ["plain", "plain again"]
        assert names[-1] == "naive concat"
        assert {"auto", "channels", "map", "branch", "computed"} <= set(names)
        assert group.rows[0].ratio == Ratio(1.0, 1.0, 1.0)
        for row in group.rows:
            assert row.ratio.value == row.seconds / group.rows[0].seconds
            assert row.file_size > 0
    assert report.sites == 3
    assert any(note.startswith(f"auto on {CPU}: ") for note in report.notes)


def test_all_that_export_takes_is_timed() -> None:
    assert set(accepted_lowerings()) == {"auto", "autotune", *LOWERINGS}


def test_the_batch_that_is_timed_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[int, ...]] = []

    class Spy(BoundRun):
        def __init__(self, session: Any, arrays: Any) -> None:
            fed.append(tuple(arrays[0].shape))
            super().__init__(session, arrays)
            assert len(self.outputs()[0]) == len(arrays[0])

    monkeypatch.setattr(bench, "BoundRun", Spy)
    bench_onnx(
        patched("first"),
        images(2),
        lowerings=["map"],
        naive=False,
        providers=CPU_ONLY,
        batches=(1, 4),
        repeats=1,
    )
    assert fed == [(1, 3, 12, 16)] * 3 + [(4, 3, 12, 16)] * 3


def test_threads_are_the_sessions_and_they_do_not_spin_between_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, str]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        session = make_session(*arguments, **options)
        made = session.get_session_options()
        entry = made.get_session_config_entry("session.force_spinning_stop")
        seen.append((made.intra_op_num_threads, entry))
        return session

    monkeypatch.setattr(bench, "make_session", spy)
    bench_onnx(
        patched("first"),
        images(1),
        lowerings=[],
        naive=False,
        providers=CPU_ONLY,
        threads=(1, 2),
        repeats=1,
    )
    assert seen == [(1, "1")] * 2 + [(2, "1")] * 2


def test_variants_that_a_model_cannot_take_are_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_autotune_out(monkeypatch)
    graph = torch.fx.symbolic_trace(_Functional().eval())
    model = ccp.patch(graph, "all", example_inputs=images(1))
    found = bench_onnx(model, images(1), providers=CPU_ONLY, repeats=1)
    names = {row.name for row in found.groups[0].rows}
    assert {"plain", "map", "branch"} <= names
    assert not names & {"channels", "naive concat"}
    for name in ("channels", "naive concat"):
        assert any(note.startswith(f"{name} is left out: ") for note in found.notes)
    with pytest.raises(ExportError, match="no 'channels' lowering"):
        bench_onnx(model, images(1), providers=CPU_ONLY, lowerings=["channels"], repeats=1)


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight)


def test_a_model_of_two_inputs_runs_at_its_own_batch() -> None:
    class Pair(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    torch.manual_seed(0)
    pair = (images(2), images(2))
    model = ccp.patch(Pair().eval(), "stem", example_inputs=pair)
    found = bench_onnx(model, pair, lowerings=["map"], naive=False, providers=CPU_ONLY, repeats=1)
    assert [group.batch for group in found.groups] == [2]
    with pytest.raises(ArgumentError, match="batches= repeats a single tensor"):
        bench_onnx(model, pair, batches=(1,), providers=CPU_ONLY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowerings": ["fold"]}, "write auto, .*channels, map"),
        ({"repeats": 0}, "at least one repeat"),
        ({"threads": (-1,)}, "numbers of threads from 0"),
        ({"threads": ()}, "numbers of threads from 0"),
        ({"batches": (0,)}, "write numbers from 1 on"),
        ({"providers": ["X"]}, "has no X; it has"),
    ],
)
def test_impossible_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        bench_onnx(patched(), images(1), **options)


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(PatchError, match="not patched"):
        bench_onnx(Net().eval(), images(1))


# --- what is printed ----------------------------------------------------------------------------


def row(name: str, milliseconds: float, low: float, high: float, size: int) -> BenchRow:
    ratio = Ratio(milliseconds / 4, low, high)
    return BenchRow(name, milliseconds / 1e3, ratio, size)


def made(again: tuple[float, float] = (0.995, 1.004)) -> BenchReport:
    rows = (
        row("plain", 4.0, 1.0, 1.0, 1_000_000),
        row("plain again", 4.0, *again, 1_000_000),
        row("auto", 4.2, 1.04, 1.06, 1_010_000),
        row("naive concat", 6.0, 1.45, 1.58, 1_020_000),
    )
    groups = (
        BenchGroup(CPU, 1, 1, rows),
        BenchGroup(CPU, 4, 0, rows),
        BenchGroup("CUDAExecutionProvider", 4, 0, rows),
    )
    return BenchReport(groups, 30, 53, describe_machine(), ("map is left out: why",))


def test_the_markdown_is_this() -> None:
    lines = made().markdown(subject="timm:resnet50", command="coordconv-patch bench x").splitlines()
    assert lines[0] == "### coordconv-patch bench: timm:resnet50, 53 patched sites"
    assert "- command: `coordconv-patch bench x`" in lines
    assert "- map is left out: why" in lines
    start = lines.index("**CPUExecutionProvider, batch 1, 1 thread**")
    assert lines[start + 1 : start + 8] == [
        "",
        "| variant      | median ms | ratio |  95 % interval | file MB | file growth |",
        "|:-------------|----------:|------:|---------------:|--------:|------------:|",
        "| plain        |     4.000 | 1.000 | 1.000 to 1.000 |    1.00 |       +0.0% |",
        "| plain again  |     4.000 | 1.000 | 0.995 to 1.004 |    1.00 |       +0.0% |",
        "| auto         |     4.200 | 1.050 | 1.040 to 1.060 |    1.01 |       +1.0% |",
        "| naive concat |     6.000 | 1.500 | 1.450 to 1.580 |    1.02 |       +2.0% |",
    ]
    assert "**CPUExecutionProvider, batch 4, default threads**" in lines
    assert "**CUDAExecutionProvider, batch 4**" in lines
    assert str(made()).splitlines()[0] == "### coordconv-patch bench: a model, 53 patched sites"


def test_a_machine_that_was_not_quiet_is_said_to_be() -> None:
    assert "not quiet" not in made().markdown()
    assert "against itself gave 1.000 (0.960 to 1.004)" in made((0.96, 1.004)).markdown()


def test_the_json_has_seconds_and_intervals() -> None:
    group = made().to_dict()["groups"][0]
    assert (group["provider"], group["batch"], group["threads"]) == (CPU, 1, 1)
    assert group["variants"]["auto"] == {
        "seconds": pytest.approx(0.0042),
        "ratio": pytest.approx(1.05),
        "ratio_95": [1.04, 1.06],
        "file_size": 1_010_000,
    }


def test_a_table_without_rows_is_its_heading() -> None:
    assert markdown_table(("a", "bc"), []) == ["| a | bc |", "|:--|---:|"]


def test_the_machine_is_described_without_its_name() -> None:
    import getpass
    import platform

    machine = describe_machine(["timm", "no-such-package"])
    text = " ".join(machine.lines())
    assert machine.cores >= 1
    assert machine.versions["onnxruntime-gpu" if _gpu_build() else "onnxruntime"] == ort.__version__
    assert machine.versions["torch"] == torch.__version__.split("+")[0]
    assert "timm" in machine.versions
    assert "no-such-package" not in text
    assert platform.node() not in text
    assert f"/{getpass.getuser()}" not in text


def _gpu_build() -> bool:
    from importlib import metadata

    return any(found.metadata["Name"] == "onnxruntime-gpu" for found in metadata.distributions())


def test_processor_of_linux_is_the_models_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: str(self) == "/proc/cpuinfo")
    text = "vendor_id : X\nmodel name\t: Fast Chip 9 @ 3 GHz\nflags : a b\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    assert describe_machine().processor == "Fast Chip 9 @ 3 GHz"


# --- the picture --------------------------------------------------------------------------------


def test_the_picture_shows_each_group_and_its_ratios(tmp_path: Path) -> None:
    draw_bench(made(), tmp_path / "b.svg", subject="timm:resnet50")
    text = (tmp_path / "b.svg").read_text()
    assert text.startswith("<?xml")
    draw_bench(made(), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_picture_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []

    def save(figure: Figure, file: Any, **options: Any) -> None:
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    draw_bench(made(), tmp_path / "b.png", subject="timm:resnet50")
    (figure,) = drawn
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "CPU, batch 1, 1 thread",
        "CPU, batch 4, default threads",
        "CUDA, batch 4",
    ]
    labels = [text.get_text() for text in panels[0].texts]
    assert labels[2:] == ["1.05   4.2 ms", "1.50   6 ms"]
    points = [line.get_xdata() for line in panels[0].lines if line.get_marker() == "o"]
    assert [float(np.ravel(x)[0]) for x in points] == pytest.approx([1, 1, 1.05, 1.5])
    assert figure.get_suptitle() == "What coordinates cost: timm:resnet50, 53 convolutions patched"


def test_without_matplotlib_it_says_what_to_install_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(MissingPackageError, match=r'pip install "coordconv-patch\[picture\]"'):
        check_picture("b.png")


@pytest.mark.parametrize("name", ["b.gif", "b"])
def test_a_picture_of_unknown_kind_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"ends in \.png"):
        check_picture(name)


def test_a_picture_into_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="does not exist"):
        check_picture(tmp_path / "no" / "b.png")
