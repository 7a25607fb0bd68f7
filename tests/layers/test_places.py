"""Places: every sample sees the coordinates of the part of a picture that it is."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_convolutions import Case, cases
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import coordconv_patch as ccp
from coordconv_patch.layers.coord_layer import coord_layers

SETTINGS = settings(derandomize=True, deadline=None, max_examples=100)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@st.composite
def thetas(draw: st.DrawFn, ndim: int, samples: int) -> Tensor:
    """Crops, flips, rotations and shears, some reaching far beyond the picture."""
    number = st.floats(-2, 2, allow_nan=False, width=32)
    theta = torch.empty(samples, ndim, ndim + 1, dtype=torch.float64)
    for index in np.ndindex(*theta.shape):
        theta[index] = draw(number)
    if draw(st.booleans()):  # axis by axis, as crops and flips are
        theta[:, :, :-1] *= torch.eye(ndim, dtype=torch.float64)
    is_flat = theta[:, :, :-1].square().sum(-1).sqrt() < 0.05
    theta[:, :, :-1] += torch.eye(ndim, dtype=torch.float64) * is_flat[..., None]
    return theta


@st.composite
def placed_cases(draw: st.DrawFn) -> tuple[Case, Tensor]:
    case = draw(cases())
    batch = case.input_shape[0] if len(case.input_shape) == case.ndim + 2 else 1
    return case, draw(thetas(case.ndim, draw(st.sampled_from([batch, 1]))))


def each_alone(case: Case, layer: Any, x: Tensor, theta: Tensor) -> Tensor:
    """What the concatenating definition gives for each sample by itself."""
    samples = x if x.dim() == case.ndim + 2 else x.unsqueeze(0)
    outputs = []
    for at, sample in enumerate(samples):
        place = theta[at if len(theta) > 1 else 0]
        grid = reference.placed_grid(place, sample.shape[1:], **case.coords)
        outputs.append(case.expected(layer, sample.unsqueeze(0), grid.to(x.dtype)))
    whole = torch.cat(outputs)
    return whole if x.dim() == case.ndim + 2 else whole.squeeze(0)


def near(output: Tensor, expected: Tensor, tolerance: float) -> None:
    assert output.shape == expected.shape
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance * scale)


@SETTINGS
@given(placed=placed_cases())
def test_each_sample_equals_the_definition_at_its_own_place(placed: tuple[Case, Tensor]) -> None:
    case, theta = placed
    layer = case.coord(dtype=torch.float64)
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(case.input_shape, dtype=torch.float64, requires_grad=True)
    expected = each_alone(case, layer, x, theta)
    with ccp.places(layer, theta):
        output = case.call(layer, x)
        near(output, expected, 1e-12)
        with torch.no_grad():
            near(case.call(layer, x), expected, 1e-12)
    inputs = [x, *layer.parameters()]
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, inputs, upstream)
    for own, wanted in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        near(own, wanted, 1e-12)
    whole = case.call(layer, x)
    near(whole, case.expected(layer, x), 1e-12)  # and afterwards it is a whole picture again


@SETTINGS
@given(placed=placed_cases())
def test_single_precision_is_as_good_as_it_gets(placed: tuple[Case, Tensor]) -> None:
    case, theta = placed
    layer = case.coord()
    nn.init.normal_(layer.coord_weight)
    x = torch.randn(case.input_shape)
    with ccp.places(layer, theta.float()), torch.no_grad():
        output = case.call(layer, x)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        expected = each_alone(case, exact, x.double(), theta.float().double())
        largest = sum(
            weight.double().abs().sum() for weight in (layer.weight, layer.coord_weight)
        ) * max(1.0, float(x.abs().max()), _largest_channel(case, theta))
    assert float((output.double() - expected).abs().max()) <= 1e-6 * float(largest)


def _largest_channel(case: Case, theta: Tensor) -> float:
    size = case.input_shape[-case.ndim :]
    return max(
        float(reference.placed_grid(place, size, **case.coords).abs().max()) for place in theta
    )


@SETTINGS
@given(placed=placed_cases())
def test_at_zero_weights_outputs_are_the_plain_ones_to_the_last_bit(
    placed: tuple[Case, Tensor],
) -> None:
    case, theta = placed
    plain, layer = case.plain(), case.coord()
    x = torch.randn(case.input_shape)
    with ccp.places(layer, theta):
        assert torch.equal(case.call(layer, x), case.call(plain, x))
        with torch.no_grad():
            assert torch.equal(case.call(layer, x), case.call(plain, x))


# --- models ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, a functional one, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.norm(F.conv2d(x, self.weight, padding=1)).relu()
        return self.twice(self.twice(x).relu())


def patched(model: nn.Module | None = None, **arguments: Any) -> nn.Module:
    model = Net() if model is None else model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    ready = ccp.patch(model.eval(), "all", **arguments)
    for weight in ccp.coord_parameters(ready):
        nn.init.normal_(weight, std=0.3)
    return ready


X = torch.randn(4, 3, 17, 22, generator=torch.Generator().manual_seed(3))
WINDOWS = [
    ccp.Window((0, 0), (17, 22), (40, 60)),
    ccp.Window((10.5, 20.25), (17, 22), (40, 60)),
    ccp.Window((-3, 50), (34, 44), (40, 60)),
    ccp.Window((20, 30), (8.5, 11), (64, 64)),
]


def by_windows(model: nn.Module, x: Tensor = X) -> Tensor:
    """Each sample by itself, with its window set in every layer."""
    alone = copy.deepcopy(model)
    outputs = []
    with torch.no_grad():
        for sample, window in zip(x, WINDOWS, strict=True):
            ccp.set_window_(alone, window)
            outputs.append(alone(sample.unsqueeze(0)))
    return torch.cat(outputs)


def test_a_batch_of_windows_equals_each_sample_with_its_window_set() -> None:
    model = patched()
    expected = by_windows(model)
    assert (expected - model(X)).abs().max() > 0.1
    with torch.no_grad(), ccp.places(model, WINDOWS):
        near(model(X), expected, 1e-6)
    thetas_ = torch.stack([window.theta() for window in WINDOWS])
    for given_ in (thetas_, thetas_.float(), thetas_.numpy()):
        with torch.no_grad(), ccp.places(model, given_):
            near(model(X), expected, 2e-6)


def test_one_place_is_for_all_samples() -> None:
    model = patched()
    alone = copy.deepcopy(model)
    ccp.set_window_(alone, WINDOWS[1])
    for given_ in (WINDOWS[1], WINDOWS[1].theta()):
        with torch.no_grad(), ccp.places(model, given_):
            near(model(X), alone(X), 1e-6)


def test_places_nest_and_end_also_by_an_error() -> None:
    model = patched().eval()
    with torch.no_grad():
        whole = model(X)
        with ccp.places(model, WINDOWS[0]):
            outer = model(X)
            with ccp.places(model, WINDOWS[1]):
                assert not torch.equal(model(X), outer)
            with pytest.raises(ccp.PatchError), ccp.places(model, WINDOWS):
                model(X[:3])
            assert torch.equal(model(X), outer)
        assert torch.equal(model(X), whole)


def test_lasting_places_hold_until_taken_away_and_travel_with_copies() -> None:
    model = patched()
    whole, expected = model(X).detach(), by_windows(model)
    assert ccp.set_places_(model, WINDOWS) is model
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        for each in (model, copy.deepcopy(model), loaded):
            near(each(X), expected, 1e-6)
        with ccp.places(model, WINDOWS[0]):
            assert not torch.allclose(model(X), expected)
        ccp.set_places_(model, None)
        assert torch.equal(model(X), whole)
        near(loaded(X), expected, 1e-6)
    plain = ccp.unpatch(model, discard=True)
    assert plain(X).shape == whole.shape
    assert not any("_places" in vars(module) for module in plain.modules())


def test_gradients_flow_to_the_place() -> None:
    """As a spatial transformer needs them; by finite differences."""
    model = patched().double()
    theta = torch.stack([window.theta() for window in WINDOWS]).requires_grad_()

    def outputs(theta: Tensor) -> Tensor:
        with ccp.places(model, theta):
            return model(X.double()).square().mean((1, 2, 3))

    (gradient,) = torch.autograd.grad(outputs(theta).sum(), theta)
    step = torch.zeros_like(theta)
    step[:, 1, 2] = 1e-6
    difference = (outputs(theta + step) - outputs(theta - step)) / 2e-6
    torch.testing.assert_close(gradient[:, 1, 2], difference, rtol=1e-5, atol=1e-7)


def test_programs_fx_graphs_and_chosen_calls_follow() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.conv(x).relu()
            return x

    chosen = ccp.patch(Pyramid().eval(), "conv@1", example_inputs=X[:1])
    nn.init.normal_(next(iter(ccp.coord_parameters(chosen))))
    model = patched()
    batch = {"x": {0: torch.export.Dim("batch")}}
    program = ccp.from_exported(torch.export.export(model, (X,), dynamic_shapes=batch))
    traced = patched(torch.fx.symbolic_trace(Net().eval()))
    with torch.no_grad():
        near(program(X), model(X), 1e-6)
        for each in (chosen, program, traced):
            assert coord_layers(each)
            with ccp.places(each, WINDOWS):
                near(each(X), by_windows(each), 2e-6)


# --- threads, wrappers, compilers, checkpoints ----------------------------------------------------


def in_threads(work: Callable[[int], None], count: int = 8) -> None:
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_each_thread_has_its_own_places(compiled: bool) -> None:
    model = patched()
    run: Any = torch.compile(model, backend="eager") if compiled else model
    places: list[Any] = [None, *WINDOWS]

    def outputs(place: Any, call: Any) -> Tensor:
        with torch.no_grad():
            if place is None:
                return call(X)
            with ccp.places(model, place):
                return call(X)

    expected = [outputs(place, model) for place in places]
    for place in places:
        outputs(place, run)

    def work(index: int) -> None:
        for step in range(12):
            at = (index + step) % len(places)
            near(outputs(places[at], run), expected[at], 1e-6)

    in_threads(work)


def _outputs(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of whole pictures, and of each window."""
    with torch.no_grad():
        outputs = [run(X)]
        for window in WINDOWS:
            with ccp.places(model, window):
                outputs.append(run(X))
    return outputs


@pytest.mark.parametrize("compiled", [False, True])
def test_each_task_has_its_own_places(compiled: bool) -> None:
    torch._dynamo.reset()
    model = patched()
    counter = CompileCounter()
    run: Any = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    expected = _outputs(model, model)

    async def task(at: int) -> None:
        for step in range(3):
            with ccp.places(model, WINDOWS[(at + step) % len(WINDOWS)]):
                await asyncio.sleep(0)  # others enter theirs meanwhile
                with torch.no_grad():  # a thread's, so never around an await
                    near(run(X), expected[1 + (at + step) % len(WINDOWS)], 1e-6)
            await asyncio.sleep(0)
            with torch.no_grad():
                near(run(X), expected[0], 1e-6)

    async def tasks() -> None:
        await asyncio.gather(*map(task, range(len(WINDOWS))))

    asyncio.run(tasks())
    with torch.no_grad():
        near(run(X), expected[0], 1e-6)
    assert counter.frame_count == (2 if compiled else 0)  # without places, and with them


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_task_begins_has_its_places(compiled: bool) -> None:
    torch._dynamo.reset()
    model = patched()
    run: Any = torch.compile(model, backend="eager") if compiled else model
    expected = _outputs(model, model)
    _outputs(model, run)

    async def work() -> None:
        with ccp.places(model, WINDOWS[0]):
            begun = asyncio.create_task(asyncio.to_thread(torch.no_grad()(run), X))
        with ccp.places(model, WINDOWS[1]):
            near(await asyncio.to_thread(torch.no_grad()(run), X), expected[2], 1e-6)
        near(await begun, expected[1], 1e-6)

    asyncio.run(work())


def test_places_may_be_left_in_another_order() -> None:
    model = patched()
    whole, first, second, third = _outputs(model, model)[:4]

    def now() -> Tensor:
        with torch.no_grad():
            output: Tensor = model(X)
        return output

    def within(at: int) -> Iterator[None]:
        with ccp.places(model, WINDOWS[at]):
            yield

    generators = [within(at) for at in range(3)]
    for generator in generators:
        next(generator)
    near(now(), third, 0)
    generators[1].close()
    near(now(), third, 0)
    generators[2].close()
    near(now(), first, 0)
    with ccp.places(model, WINDOWS[1]):
        generators[0].close()
        near(now(), second, 0)
    near(now(), whole, 0)


def test_places_may_be_left_in_another_task() -> None:
    model = patched()
    whole, first, second = _outputs(model, model)[:3]

    async def outputs() -> Any:
        with ccp.places(model, WINDOWS[0]):
            yield
        yield

    async def enter_and_leave() -> None:
        generator = outputs()
        await anext(generator)
        near(model(X), first, 0)
        await asyncio.create_task(anext(generator))
        near(model(X), whole, 0)
        generator = outputs()
        await anext(generator)
        with ccp.places(model, WINDOWS[1]):
            await asyncio.create_task(anext(generator))
            near(model(X), second, 0)
        near(model(X), whole, 0)

    with torch.no_grad():
        asyncio.run(enter_and_leave())
        near(model(X), whole, 0)


def test_places_that_were_left_are_not_kept_alive() -> None:
    model = patched()
    theta = torch.eye(2, 3).repeat(len(X), 1, 1)
    with ccp.places(model, theta):
        model(X)
    is_alive = weakref.ref(theta)
    gc.disable()
    try:
        del theta
        assert is_alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("trains", [False, True])
def test_other_places_do_not_compile_again(trains: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = patched()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(trains):
        for step in range(50):
            theta = torch.rand(4, 2, 3) + torch.eye(2, 3)
            with ccp.places(model if step % 2 else compiled, theta):
                near(compiled(X), model(X), 1e-6)
    assert counter.frame_count == 1


def test_compiled_gradients_are_right() -> None:
    torch._dynamo.reset()
    model = patched()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    parameters = ccp.coord_parameters(model)
    with ccp.places(model, WINDOWS):
        own = torch.autograd.grad(compiled(X).square().sum(), parameters)
        expected = torch.autograd.grad(model(X).square().sum(), parameters)
    for gradient, wanted in zip(own, expected, strict=True):
        near(gradient, wanted, 1e-5)


class Checkpointed(nn.Module):
    """Runs blocks again in the backward pass; the blocks checkpoint a part of themselves too."""

    def __init__(self, reentrant: bool, nested: bool) -> None:
        super().__init__()
        self.first, self.net, self.last = nn.Conv2d(3, 3, 3), Net(), nn.Conv2d(8, 4, 3)
        self.reentrant, self.nested = reentrant, nested
        self.is_on = True

    def region(self, x: Tensor) -> Tensor:
        if self.nested and self.is_on:
            x = checkpoint(self.net, x, use_reentrant=self.reentrant)
        else:
            x = self.net(x)
        return self.last(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.is_on:
            return self.region(x)
        return checkpoint(self.region, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_run_again_at_the_places_of_their_first_run(
    reentrant: bool, nested: bool
) -> None:
    model = patched(Checkpointed(reentrant, nested))
    parameters = ccp.coord_parameters(model)
    places = [WINDOWS[::-1], None, WINDOWS]

    def losses() -> list[Tensor]:
        results = []
        for place in places:
            if place is None:
                results.append(model(X).square().sum())
                continue
            with ccp.places(model, place):
                results.append(model(X).square().sum())
        return results

    def gradients() -> list[Tensor]:
        """After the places were left, the last forward pass first, and within others' places."""
        found: list[Tensor] = []
        last, middle, first = losses()[::-1]
        with ccp.places(model, WINDOWS[3]):
            model.zero_grad()
            first.backward()
            found += [parameter.grad.clone() for parameter in parameters]
        for loss in (last, middle):
            model.zero_grad()
            loss.backward()
            found += [parameter.grad.clone() for parameter in parameters]
        return found

    own = gradients()
    model.is_on = False
    for gradient, wanted in zip(own, gradients(), strict=True):
        near(gradient, wanted, 1e-6)


def test_running_again_by_unknown_code_without_places_is_refused() -> None:
    model = patched()

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return model(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(model(x), x, gradient)[0]

    x = X.clone().requires_grad_()
    with ccp.places(model, WINDOWS):
        inside = Again.apply(x).sum()
        inside.backward()
    with ccp.places(model, WINDOWS):
        left = Again.apply(x).sum()
    with pytest.raises(ccp.PatchError, match=r"call backward\(\) inside of `with places"):
        left.backward()


def test_distributed_data_parallel_follows(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = patched()
        wrapped = nn.parallel.DistributedDataParallel(model)
        parameters = ccp.coord_parameters(model)
        with ccp.places(wrapped, WINDOWS):
            loss = wrapped(X).square().sum()
        loss.backward()
        own = [parameter.grad.clone() for parameter in parameters]
        with ccp.places(model, WINDOWS):
            expected = torch.autograd.grad(model(X).square().sum(), parameters)
        for gradient, wanted in zip(own, expected, strict=True):
            near(gradient, wanted, 1e-6)
    finally:
        torch.distributed.destroy_process_group()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        (None, r"places=None: write a tensor of shape \(N, 2, 3\)"),
        ([], r"places=\[\]: write a tensor"),
        ("left", "places='left': write a tensor"),
        (torch.zeros(2, 3, dtype=torch.long), "a tensor of torch.int64: .*of floats"),
        (torch.zeros(4, 3, 3), r"a tensor of shape \(4, 3, 3\): write"),
        (torch.zeros(3), r"a tensor of shape \(3,\): write"),
        (torch.full((2, 3), math.nan), "is not finite"),
        (torch.zeros(2, 3), "a row of theta is zero but for its last number"),
        (torch.eye(3, 4), r"places of 3 dimensions, but first has 2: .*\(N, 2, 3\)"),
        (
            [ccp.Window((0,), (1,), (2,)), WINDOWS[0]],
            "the windows have different numbers of dimensions",
        ),
    ],
)
def test_other_places_are_refused(theta: Any, message: str) -> None:
    model = patched()
    for enter in (ccp.set_places_, lambda *given: ccp.places(*given).__enter__()):
        if theta is None and enter is ccp.set_places_:
            continue
        with pytest.raises(ccp.CoordinatesError, match=message):
            enter(model, theta)
    with torch.no_grad():
        assert torch.equal(model(X), model(X))


def test_a_plain_model_a_window_and_swapped_sizes_are_refused() -> None:
    with pytest.raises(ccp.PatchError, match="has no coordinate"):
        ccp.set_places_(Net(), WINDOWS)
    model = patched()
    ccp.set_window_(model, WINDOWS[0])
    with pytest.raises(ccp.CoordinatesError, match="first has a window already"):
        ccp.set_places_(model, WINDOWS)
    with pytest.raises(ccp.CoordinatesError, match="first has swap_sizes"):
        ccp.set_places_(patched(coords="reference"), WINDOWS)


def test_a_batch_of_another_size_is_refused_by_the_layer_that_sees_it() -> None:
    model = patched()
    with (
        ccp.places(model, WINDOWS),
        pytest.raises(ccp.PatchError, match="first gets 3 samples, and there are places for 4"),
    ):
        model(X[:3])
