"""Several threads at a time: what one alone gives, and nothing noticed by those that only serve."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from old_torch import BEFORE_2_9, IS_2_6
from other_threads import Halting, another_thread
from thread_trials import TRIALS, Outcome, Twice, pictures, plain_net, run, serving, trained
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError
from coordconv_patch.graphs.conv_tracer import trace
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.layers.map_cache import MapCache
from coordconv_patch.running import silence, tracing_gate
from coordconv_patch.running import untouched as modes

MODULE_CALL = nn.Module.__call__
MODULE_GETATTR = nn.Module.__getattr__


@pytest.fixture(autouse=True)
def eager_switches() -> Iterator[None]:
    """Threads take turns often, and afterwards the process is as it was."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    streams, filters = (sys.stdout, sys.stderr), list(warnings.filters)
    descriptors = [os.fstat(number) for number in (1, 2)]
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)
    assert nn.Module.__call__ is MODULE_CALL
    assert nn.Module.__getattr__ is MODULE_GETATTR
    assert (sys.stdout, sys.stderr) == streams
    assert [os.path.samestat(a, os.fstat(b)) for a, b in zip(descriptors, (1, 2), strict=True)]
    after = list(warnings.filters)
    # What torch.compile of older versions imports adds filters of its own.
    assert (after[-len(filters) :] if BEFORE_2_9 else after) == filters
    assert not any(map(_is_ours, after))
    assert logging.root.manager.disable == 0
    assert torch.get_default_dtype() is torch.float32


def assert_right(*outcomes: Outcome) -> None:
    for outcome in outcomes:
        assert (outcome.wrong, outcome.failed) == (0, 0), outcome.errors[:3]


def plain_server() -> Callable[[], Tensor]:
    served, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(1, 3, 16, 16)
    return lambda: served(x)


@pytest.mark.parametrize("kind", TRIALS)
def test_eight_threads_give_what_one_gives_and_other_models_run_on(kind: str) -> None:
    with serving(plain_server()) as served:
        outcome = run(TRIALS[kind](), 4 if kind == "exports" else 40)
    assert_right(outcome, served)


@pytest.mark.threads
@pytest.mark.parametrize("kind", TRIALS)
def test_a_thousand_times(kind: str) -> None:
    with serving(plain_server()) as served:
        outcome = run(TRIALS[kind](), 1000)
    assert_right(outcome, served)


def test_all_kinds_side_by_side() -> None:
    trials = [make() for kind, make in TRIALS.items() if kind != "exports"]
    with serving(plain_server()) as served:
        outcome = run(lambda n: trials[n % len(trials)](n // len(trials)), 10 * len(trials))
    assert_right(outcome, served)


# Models that other threads run meanwhile


class _Attributes(nn.Module):
    """Reads parameters in its own forward, through ``nn.Module.__getattr__``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3, 1, 1), 2.0))
        self.inner = nn.ModuleList([nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.inner:
            x = conv(x) * self.scale + torch.zeros(3, 1, 1)
        return x


def _compiled(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.compile(model, backend="eager", fullgraph=True)


def _scripted(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.trace(model, x)


def _patched(model: nn.Module, x: Tensor) -> nn.Module:
    return trained(ccp.patch(model, "all", coords=Coordinates(radius=True, fourier=2)))


def _as_it_is(model: nn.Module, x: Tensor) -> nn.Module:
    return model


@pytest.mark.parametrize(
    ("kind", "prepare"),
    [
        *(("patches", prepare) for prepare in (_as_it_is, _compiled, _scripted, _patched)),
        ("foreign_folds", _scripted),  # seconds each
        ("foreign_folds", _patched),
    ],
)
def test_forwards_of_other_models_go_on(
    kind: str, prepare: Callable[[nn.Module, Tensor], nn.Module]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 12, 12)
    served = prepare(_Attributes().eval(), x)
    with serving(torch.no_grad()(lambda: served(x))) as outcome:
        operations = run(TRIALS[kind](), 24)
    assert_right(operations, outcome)


@pytest.mark.parametrize("prepare", [_as_it_is, _scripted, _patched])
def test_forwards_of_other_models_go_on_while_models_are_exported(
    prepare: Callable[[nn.Module, Tensor], nn.Module],
) -> None:
    """To rounding: torch.export switches oneDNN off for the whole process."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 12, 12)
    served = prepare(_Attributes().eval(), x)
    with torch.no_grad():
        wanted = served(x)

    @torch.no_grad()
    def forward() -> Tensor:
        return torch.tensor(torch.allclose(served(x), wanted, atol=1e-4))

    with serving(forward) as outcome:
        operations = run(TRIALS["exports"](), 2)
    assert_right(operations, outcome)


def test_the_model_that_is_patched_is_served_meanwhile() -> None:
    net, (x,) = plain_net(), pictures(16)
    with serving(lambda: net(x)) as served:
        operations = run(lambda n: len(ccp.plan(net, "all", example_inputs=x).rows) == 3, 40)
    assert_right(operations, served)


def test_calls_of_other_threads_are_not_recorded() -> None:
    class Busy(Twice):
        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as pool:  # another thread, at this moment
                pool.submit(self.conv, torch.zeros(1, 3, 8, 8)).result()
            return super().forward(x)

    (row,) = ccp.plan(Busy().eval(), "all", example_inputs=pictures(16)[0]).rows
    assert [call.input_size for call in row.site.calls or ()] == [(16, 17)] * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_threads_compile_while_models_are_patched(backend: str) -> None:
    x = torch.randn(2, 3, 12, 12)
    patch = TRIALS["patches"]()

    def compile_and_run(n: int) -> bool:
        if n % 4:
            return patch(n)
        torch.manual_seed(n)
        model = _Attributes().eval()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        return torch.allclose(compiled(x), model(x), atol=1e-5)

    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch({"cache_size_limit" if IS_2_6 else "recompile_limit": 64}):
            assert_right(run(compile_and_run, 32))
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("tracer", ["torch.fx", "torch.export"])
def test_another_thread_traces_by_itself_while_models_are_patched(tracer: str) -> None:
    x = torch.randn(2, 3, 12, 12)
    model = _Attributes().eval()
    with torch.no_grad():
        wanted, nodes = model(x), len(fx.symbolic_trace(model).graph.nodes)
    patch, busy = TRIALS["patches"](), threading.Lock()  # two traces not of ours would collide

    def operate(n: int) -> bool:
        if n % 8:
            return patch(n)
        with busy, torch.no_grad():
            if tracer == "torch.fx":
                return len(fx.symbolic_trace(model).graph.nodes) == nodes
            return torch.allclose(torch.export.export(model, (x,)).module()(x), wanted, atol=1e-5)

    assert_right(run(operate, 48))


def test_tracing_waits_for_a_trace_that_runs_already_and_gives_up_clearly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing_gate, "PATIENCE", 0.05)
    halting = Halting()
    with ThreadPoolExecutor(1) as pool:
        traced = pool.submit(fx.symbolic_trace, halting)
        assert halting.begun.wait(60)
        with pytest.raises(PatchError, match="another thread has been tracing or compiling"):
            ccp.patch(plain_net(), "all")
        monkeypatch.setattr(tracing_gate, "PATIENCE", 60)
        waiting = threading.Timer(0.2, halting.leave.set)
        waiting.start()
        assert len(ccp.plan(plain_net(), "all").rows) == 3
        assert len(traced.result().graph.nodes) == 3


def test_a_trace_may_be_begun_within_a_trace() -> None:
    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = len(trace(plain_net()).nodes)
            return self.conv(x)

    for tracer in (trace, lambda module: fx.symbolic_trace(module).graph):
        with serving(plain_server()) as served:
            assert len(tracer(Curious()).nodes) == 3
        assert_right(served)


def test_a_failed_trace_leaves_no_trace() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        trace(Failing())
    assert nn.Module.__call__ is MODULE_CALL
    assert len(trace(plain_net()).nodes) == 9
    assert len(fx.symbolic_trace(plain_net()).graph.nodes) == 9


def test_a_process_ends_with_the_modules_and_the_streams_that_it_began_with() -> None:
    """Eight threads that patch and export at once."""
    code = (
        "import os, sys, torch\n"
        "from thread_trials import TRIALS, run\n"
        "from torch import nn\n"
        "torch.set_num_threads(1)\n"
        "sys.setswitchinterval(1e-6)\n"
        "before = nn.Module.__call__, nn.Module.__getattr__, sys.stdout, sys.stderr\n"
        "for kind, count in ('patches', 32), ('providers', 64), ('exports', 4):\n"
        "    outcome = run(TRIALS[kind](), count)\n"
        "    assert (outcome.wrong, outcome.failed) == (0, 0), outcome\n"
        "assert before == (nn.Module.__call__, nn.Module.__getattr__, sys.stdout, sys.stderr)\n"
        "print('printed'); print('complained', file=sys.stderr)\n"
        "sys.stdout.flush(); os.write(1, b'written')\n"
    )
    here = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["printed", "written"]
    assert ran.stderr.split() == ["complained"]


# Chosen calls


def test_copies_and_pickles_of_chosen_calls_count_for_themselves() -> None:
    (x,) = pictures(16)
    model = trained(ccp.patch(Twice().eval(), "conv@1", example_inputs=x))
    wanted = model(x)
    made: list[nn.Module] = []

    def copy_in_the_middle(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        handle.remove()  # it could not be pickled
        made.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model))])

    handle = model.conv.register_forward_pre_hook(copy_in_the_middle)
    assert torch.equal(model(x), wanted)
    assert len(made) == 2
    for copied in made:
        with pytest.raises(PatchError, match="outside of it"):
            copied.conv(x)
        assert torch.equal(copied(x), wanted)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_chosen_calls_are_counted_in_every_thread_when_compiled(fullgraph: bool) -> None:
    class Broken(Twice):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            if not fullgraph:
                torch._dynamo.graph_break()
            return self.conv(x)

    inputs = pictures(8, 12)
    torch.manual_seed(0)
    model = trained(ccp.patch(Broken().eval(), "conv@1", example_inputs=inputs[0]))
    wanted = [model(x) for x in inputs]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
    for x in inputs * 2:  # threads that find nothing compiled would each compile, any model
        compiled(x)
    graphs = counter.frame_count
    outcome = run(lambda n: torch.equal(compiled(inputs[n % 2]), wanted[n % 2]), 200)
    torch._dynamo.reset()
    assert_right(outcome)
    assert counter.frame_count == graphs


def test_a_chosen_call_in_a_thread_of_the_callers_own_is_refused() -> None:
    class Delegating(Twice):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            if self.training:
                with ThreadPoolExecutor(1) as pool:
                    return pool.submit(self.conv, x).result()
            return self.conv(x)

    (x,) = pictures(8)
    with pytest.raises(PatchError, match="a thread of its own"):  # the check runs it in training
        ccp.patch(Delegating().eval(), "conv@1", example_inputs=x)
    model = ccp.patch(Delegating().eval(), "conv@1", example_inputs=x, check=False)
    with pytest.raises(PatchError, match="a thread of its own"):
        model.train()(x)


def test_replicas_of_data_parallel_count_for_themselves() -> None:
    (x,) = pictures(16)
    torch.manual_seed(0)
    model = trained(ccp.patch(Twice().eval(), "conv@1", example_inputs=x))
    wanted = model(x)
    replicas = []
    for _ in range(8):  # what nn.parallel.replicate does, without its devices
        conv, replica = model.conv._replicate_for_data_parallel(), None
        replica = model._replicate_for_data_parallel()
        replica._modules["conv"] = conv
        conv._parameters = dict(model.conv._parameters)
        replicas.append(replica)
    assert_right(run(lambda n: torch.equal(replicas[n % 8](x), wanted), 400))


# Kept maps


def test_a_map_made_while_the_cache_was_cleared_is_not_kept() -> None:
    cache, weight = MapCache(), nn.Parameter(torch.ones(1, 1, 1, 1))
    x = torch.zeros(1, 1, 2, 2)

    def out_of_date(input: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        cache.clear()  # another thread, at this moment
        return torch.full((1, 1, 2, 2), 1.0)

    cache.get(weight, x, x, out_of_date)
    fresh = cache.get(weight, x, x, lambda *_: torch.full((1, 1, 2, 2), 2.0))
    assert fresh.eq(2).all()


def test_a_map_is_made_from_the_weight_that_it_is_kept_for() -> None:
    cache, weight = MapCache(), nn.Parameter(torch.ones(1, 1, 1, 1))
    x = torch.zeros(1, 1, 2, 2)

    def while_trained(input: Tensor, output: Tensor, given: Tensor) -> Tensor:
        with torch.no_grad():
            weight.fill_(5.0)  # another thread, at this moment
        made = given.expand(1, 1, 2, 2).clone()
        with torch.no_grad():
            weight.fill_(1.0)
        return made

    assert cache.get(weight, x, x, while_trained).eq(1).all()
    assert cache.get(weight, x, x, while_trained).eq(1).all()


def test_one_thread_trains_while_others_evaluate() -> None:
    (x,) = pictures(16)
    model = trained(ccp.patch(plain_net(), "first")).requires_grad_(False)
    layer = model[0]
    layer.coord_weight.requires_grad_(True)
    before = layer.coord_weight.detach().clone()
    stop, failures = threading.Event(), []

    def train() -> None:
        optimizer = torch.optim.SGD([layer.coord_weight], lr=1e-3)
        try:
            while not stop.is_set():
                optimizer.zero_grad()
                layer(x).square().sum().backward()
                optimizer.step()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    with torch.no_grad():
        evaluated = run(torch.no_grad()(lambda n: layer(x).isfinite().all().item()), 400)
    stop.set()
    thread.join()
    assert_right(evaluated)
    assert not failures
    assert not torch.equal(before, layer.coord_weight)
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), fresh(x))


def test_a_layer_computes_the_same_bits_while_another_thread_captures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.export and torch.compile say "capturing" to the whole process."""
    coords = Coordinates(radius=True, fourier=6)
    layer = trained(ccp.CoordConv2d(3, 4, 3, coords=coords).eval())
    x = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        wanted = copy.deepcopy(layer)(x)
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
        assert torch.compiler.is_compiling()
        assert torch.equal(copy.deepcopy(layer)(x), wanted)


# Models that are looked at


def test_two_threads_that_look_at_a_model_leave_it_as_it_was() -> None:
    net = plain_net()
    net[3].train()
    flags = [module.training for module in net.modules()]

    def look(n: int) -> bool:
        with modes.in_mode(net, training=bool(n % 2)):
            return all(module.training is bool(n % 2) for module in net.modules())

    assert_right(run(look, 400))
    assert [module.training for module in net.modules()] == flags


def test_flags_that_are_right_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    net, written = plain_net(), []
    set_attribute = nn.Module.__setattr__

    def note(module: nn.Module, name: str, value: object) -> None:
        written.append(name)
        set_attribute(module, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", note)
    with modes.evaluation(net):
        pass
    assert "training" not in written


def test_patching_one_model_in_place_from_two_threads_patches_it_once() -> None:
    for _ in range(10):
        net, barrier = plain_net(), threading.Barrier(2)

        def patch(n: int, net: nn.Module = net, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                return ccp.patch_(net, "all") is net
            except ccp.errors.CoordConvPatchError:
                return False

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(patch, range(2))) == [False, True]
        (x,) = pictures(16)
        assert torch.equal(net(x), plain_net()(x))
        assert type(ccp.unpatch_(net)[0]) is nn.Conv2d


def test_folding_does_not_change_the_default_dtype_of_other_threads() -> None:
    seen: list[torch.dtype] = []
    model = trained(ccp.patch(plain_net(), "all"))

    def slow_fuse(plain: nn.Module) -> nn.Module:
        with ThreadPoolExecutor(1) as pool:  # another thread, at this moment
            seen.append(pool.submit(lambda: torch.zeros(1).dtype).result())
        return fx.experimental.optimization.fuse(plain)

    ccp.fold_with(model, slow_fuse)
    assert set(seen) == {torch.float32}


def test_a_folding_that_makes_tensors_in_the_old_way_keeps_its_digits() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x

    def old_fuse(plain: Residual) -> nn.Module:
        kernel = plain.conv.weight.detach().clone()
        for channel in range(3):
            kernel[channel, channel, 1, 1] += 1
        fused = nn.Conv2d(3, 3, 3, padding=1)
        fused.weight = nn.Parameter(torch.Tensor(kernel.shape))
        fused.weight.data.copy_(kernel)
        fused.bias.data.copy_(plain.conv.bias)
        return fused

    torch.manual_seed(0)
    model, (x,) = trained(ccp.patch(Residual().eval(), "all")), pictures(16)
    folded = ccp.fold_with(model, old_fuse)
    assert torch.equal(folded.coord_weight, model.conv.coord_weight)
    assert torch.allclose(folded(x), model(x), atol=1e-5)


# What is printed, logged and warned of


def test_what_other_threads_print_and_log_meanwhile_is_not_lost(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("of_another_library")
    with another_thread(silence.output_silenced):
        print("heard")
        print("heard too", file=sys.stderr)
        logger.warning("logged")
    with silence.output_silenced():
        print("not heard")
        print("not heard", file=sys.stderr)
        logger.warning("not logged")
        logger.error("an error")
    assert capsys.readouterr() == ("heard\n", "heard too\n")
    assert [record.message for record in caplog.records] == ["logged", "an error"]


def test_silences_overlap_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = sys.stdout, sys.stderr
    first, second = silence.output_silenced(), silence.output_silenced()
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        print("heard")
        other.submit(print, "not heard").result()
        other.submit(second.__exit__, None, None, None).result()
        other.submit(print, "heard again").result()
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert capsys.readouterr().out == "heard\nheard again\n"


def test_a_stream_that_somebody_sets_meanwhile_is_left_in_place() -> None:
    before, theirs = sys.stdout, io.StringIO()
    with silence.output_silenced():
        sys.stdout = theirs
    try:
        assert sys.stdout is theirs
    finally:
        sys.stdout = before


def test_a_log_handler_made_in_silence_is_heard_afterwards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with silence.output_silenced():
        handler = logging.StreamHandler()
    logger = logging.getLogger("made_in_silence")
    logger.addHandler(handler)
    try:
        logger.warning("heard")
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "heard\n"


def test_warnings_are_ignored_in_their_own_thread_only() -> None:
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        with another_thread(silence.warnings_ignored):
            warnings.warn("of this thread", stacklevel=1)
        with silence.warnings_ignored(UserWarning):
            warnings.warn("not noted", stacklevel=1)
            warnings.warn("of another kind", RuntimeWarning, stacklevel=1)
    assert [str(each.message) for each in noted] == ["of this thread", "of another kind"]


def test_a_filter_that_somebody_else_has_saved_ignores_nothing_later() -> None:
    saved = warnings.catch_warnings()
    with silence.warnings_ignored():
        saved.__enter__()
    saved.__exit__(None, None, None)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
    warnings.filters[:] = [each for each in warnings.filters if not _is_ours(each)]


def _is_ours(entry: tuple[object, ...]) -> bool:
    return type(entry[1]).__module__ == silence.__name__


def test_descriptors_come_back_when_eight_threads_silence_them(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def silent(n: int) -> bool:
        with silence.descriptors_silenced():
            os.write(1, b"not heard")
        print("heard")
        return True

    assert_right(run(silent, 100))
    os.write(2, b"still there")
    out, err = capfd.readouterr()
    assert (out.count("heard"), out.count("not")) == (100, 0)
    assert err == "still there"


def test_what_stands_before_a_stream_is_made_once() -> None:
    """A print may wait in it through any number of turns, and holds no reference."""
    stream = io.StringIO()
    assert silence._audible(stream) is silence._audible(stream)


def test_a_stream_outlives_the_print_that_writes_to_it() -> None:
    """CPython's print borrows ``sys.stdout``, and crashed where it was replaced meanwhile."""
    code = (
        "import gc, threading\n"
        "from coordconv_patch.running import silence\n"
        "inside, leave = threading.Event(), threading.Event()\n"
        "def silent():\n"
        "    with silence.output_silenced():\n"
        "        inside.set()\n"
        "        leave.wait(60)\n"
        "class Late:\n"
        "    def __str__(self):\n"
        "        leave.set()\n"
        "        thread.join()\n"
        "        gc.collect()\n"
        "        fill = [bytearray(n) for n in range(40, 80) for _ in range(200)]\n"
        "        return 'late'\n"
        "thread = threading.Thread(target=silent)\n"
        "thread.start()\n"
        "inside.wait(60)\n"
        "print(Late(), 'heard')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "late heard\n"), ran.stderr


def test_silence_works_without_streams_and_with_closed_descriptors() -> None:
    code = (
        "import os, sys\n"
        "from coordconv_patch.running.silence import descriptors_silenced\n"
        "os.close(1)\n"
        "sys.stdout = None\n"
        "with descriptors_silenced():\n"
        "    os.write(2, b'not heard')\n"
        "os.write(2, b'heard')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "heard")
