"""What coordinates contribute: figures beside an independent reference, and nothing changed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.contributions.coordinate_maps import coordinate_maps


class Net(nn.Module):
    """A module, a functional convolution, and one that is called twice at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.shared = nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = F.conv2d(x, self.weight)
        large, small = self.shared(x), self.shared(F.max_pool2d(x, 2))
        return large.mean((2, 3)) + small.amax((2, 3))


def patched(std: float = 0.3) -> Any:
    torch.manual_seed(0)
    model = ccp.patch(Net(), "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=std)
    return model


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    sizes = [(4, 2, 10, 12), (2, 2, 7, 9), (3, 2, 8, 8)][:count]
    return [(torch.randn(size), torch.randn(size[0], 3)) for size in sizes]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def reference(model: Any, x: Tensor, off: str = "") -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Of each call, what the input gives and what coordinates add; in float64, written anew."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {"stem": [], "weight": [], "shared": []}
    model, x = copy.deepcopy(model).double().eval(), x.double()
    weights = dict(zip(calls, ccp.coord_parameters(model), strict=True))
    with torch.no_grad():
        weights = {
            "stem": model.stem.coord_weight,
            "weight": model.weight_coord_branch.coord_weight,
            "shared": model.shared.coord_weight,
        }

        def site(name: str, x: Tensor, weight: Tensor, bias: Any, padding: int) -> Tensor:
            grid = ccp.Coordinates().grid(x.shape[2:], dtype=torch.float64)
            plain = F.conv2d(x, weight, bias, padding=padding)
            added = F.conv2d(grid[None], weights[name], padding=padding) * (name != off)
            calls[name].append((plain, added.expand_as(plain)))
            return plain + added

        x = model.norm(site("stem", x, model.stem.weight, model.stem.bias, 1)).relu()
        x = site("weight", x, model.weight, None, 0)
        shared = ("shared", model.shared.weight, model.shared.bias, 0)
        large = site(shared[0], x, *shared[1:])
        small = site(shared[0], F.max_pool2d(x, 2), *shared[1:])
    calls["output"] = [(large.mean((2, 3)) + small.amax((2, 3)), x)]
    return calls


def variance(values: list[Tensor]) -> float:
    """Over positions and samples of all calls, the mean over channels."""
    flat = torch.cat([each.transpose(0, 1).flatten(1) for each in values], dim=1)
    return float(flat.var(dim=1, correction=0).mean())


def test_shares_are_those_of_variances_over_all_calls_and_batches() -> None:
    model = patched()
    measured = ccp.influence(model, [x for x, _ in batches()])
    runs = [reference(model, x) for x, _ in batches()]
    assert [site.site for site in measured.sites] == ["stem", "weight", "shared"]
    for site in measured.sites:
        plain = variance([call[0] for run in runs for call in run[site.site]])
        added = variance([call[1] for run in runs for call in run[site.site]])
        assert site.variance_from_input == pytest.approx(plain, rel=1e-4)
        assert site.variance_from_coords == pytest.approx(added, rel=1e-4)
        assert site.share == pytest.approx(added / (plain + added), rel=1e-4)
        assert 0.001 < added / (plain + added) < 0.999
        assert site.loss_without is site.loss_rise is site.loss_rise_error is None
    assert measured.loss is measured.loss_without_any is None


def test_losses_are_those_with_one_site_switched_off() -> None:
    model = patched()
    measured = ccp.influence(model, iter(batches()), loss_fn)

    def losses(off: str) -> Tensor:
        outputs = [(reference(model, x, off)["output"][0][0], y) for x, y in batches()]
        return torch.stack([F.mse_loss(output, y.double()) for output, y in outputs])

    on = losses("")
    assert measured.loss == pytest.approx(on.mean().item(), rel=1e-5)
    for site in measured.sites:
        off = losses(site.site)
        assert site.loss_without == pytest.approx(off.mean().item(), rel=1e-5)
        assert site.loss_rise == pytest.approx((off - on).mean().item(), rel=1e-3)
        assert abs((off - on).mean()) > 1e-3
        error = (off - on).std() / 3**0.5
        assert site.loss_rise_error == pytest.approx(error.item(), rel=1e-3)
    plain = ccp.unpatch(model, discard=True).eval()
    expected = torch.stack([loss_fn(plain, batch) for batch in batches()]).mean()
    assert measured.loss_without_any == pytest.approx(expected.item(), rel=1e-5)


def test_at_zero_nothing_is_contributed() -> None:
    measured = ccp.influence(patched(std=0.0), batches(1), loss_fn)
    assert {site.share for site in measured.sites} == {0.0}
    assert {site.loss_rise for site in measured.sites} == {0.0}
    assert measured.loss == measured.loss_without_any
    assert {site.loss_rise_error for site in measured.sites} == {None}


def test_the_model_and_the_random_state_are_left_as_they_were(tmp_path: Path) -> None:
    model = patched()
    model.norm.train()
    model.shared.eval()
    model.stem.register_forward_hook(lambda *_: None)
    before = {name: (tensor, tensor.clone(), tensor._version) for name, tensor in state(model)}
    modes = [module.training for module in model.modules()]
    attributes = [(dict(vars(m)), dict(m._forward_hooks)) for m in model.modules()]
    given = batches()
    random = torch.get_rng_state()
    ccp.influence(model, given, lambda m, b: loss_fn(m, b) + F.dropout(b[1]).mean() * 0)
    ccp.plot_coords(model, tmp_path / "maps.png", given[0][0])
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [(dict(vars(m)), dict(m._forward_hooks)) for m in model.modules()] == attributes
    for name, tensor in state(model):
        same, values, version = before[name]
        assert tensor is same
        assert torch.equal(tensor, values)
        assert tensor._version == version


def state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def test_every_pass_draws_the_same_random_numbers() -> None:
    """Else a loss that is random would rise or fall by chance."""
    model = patched(std=0.0)
    with torch.no_grad():
        model.stem.coord_weight.fill_(1e-12)  # adds something, and too little to matter
    measured = ccp.influence(
        model, batches(), lambda m, b: loss_fn(m, (b[0] + torch.randn_like(b[0]), b[1]))
    )
    assert measured["stem"].loss_rise == pytest.approx(0.0, abs=1e-6)


class Heads(nn.Module):
    """Called at two sizes, only one of which has coordinates; beside a site that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, 3, 1)
        self.unused = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).sum() + self.head(F.max_pool2d(x, 2)).sum()


def test_chosen_calls_and_sites_that_are_not_called() -> None:
    x = batches()[0][0]
    model = ccp.patch(Heads(), ["head@1"], example_inputs=x)
    ccp.patch_(model.unused)
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight)
    measured = ccp.influence(model, [x], lambda m, batch: m(batch))
    assert [site.site for site in measured.sites] == ["head", "unused"]
    small = F.conv2d(F.max_pool2d(x, 2), model.head.weight, model.head.bias).detach()
    weight = model.head.coord_branch.coord_weight.detach()
    added = F.conv2d(ccp.Coordinates().grid((5, 6))[None], weight).expand_as(small)
    assert measured["head"].variance_from_input == pytest.approx(variance([small]), rel=1e-4)
    assert measured["head"].variance_from_coords == pytest.approx(variance([added]), rel=1e-4)
    assert measured["head"].loss_rise == pytest.approx(-added.sum().item(), abs=1e-2)
    assert measured["unused"].share is measured["unused"].loss_rise is None
    assert "not called" in str(measured)


def test_graphs_and_compiled_models_are_measured_as_the_model_that_they_come_from() -> None:
    model, inputs = patched(), [x for x, _ in batches()]
    expected = ccp.influence(model, inputs)
    compiled = torch.compile(model)
    assert ccp.influence(compiled, inputs) == expected
    traced = ccp.patch(torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(2, 3, 3))), "all")
    graph = ccp.from_exported(torch.export.export(traced.eval(), (inputs[0],)))
    for weight in ccp.coord_parameters(graph):
        nn.init.normal_(weight)
    (site,) = ccp.influence(graph, inputs[:1]).sites
    assert site.share is not None
    assert site.share > 0.01


def test_places_are_entered_in_the_loss_function() -> None:
    layer = ccp.patch(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)))
    nn.init.zeros_(layer[0].weight)
    nn.init.ones_(layer[0].coord_weight)
    x = torch.rand(2, 1, 4, 4)
    windows = [ccp.Window(offset=(0, left), size=(4, 4), image_size=(4, 8)) for left in (0, 4)]

    def placed(model: nn.Module, batch: Tensor) -> Tensor:
        with ccp.places(model, windows):
            return model(batch).square().mean()

    whole = ccp.Coordinates().grid((4, 8)).sum(0)
    (site,) = ccp.influence(layer, [x], placed).sites
    assert site.variance_from_coords == pytest.approx(whole.var(correction=0).item(), rel=1e-4)


def test_what_is_printed_and_saved(tmp_path: Path) -> None:
    measured = ccp.influence(patched(), batches(), loss_fn)
    text = str(measured)
    assert text.splitlines()[0] == "what coordinates contribute"
    site = measured["stem"]
    assert site.share is not None
    assert site.loss_rise is not None
    (line,) = [line for line in text.splitlines() if "stem" in line]
    assert f"{site.share:.1%}" in line
    assert f"{site.loss_rise:+.3g} ± " in line
    assert f"loss {measured.loss:.4g}, without any coordinates" in text
    assert json.loads(json.dumps(measured.to_dict()))["sites"][0]["share"] == site.share
    with pytest.raises(KeyError):
        measured["no such site"]
    measured.plot(tmp_path / "influence.png")
    assert png_size(tmp_path / "influence.png")[0] > 1000


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_maps_are_what_the_coordinates_add() -> None:
    model, x = patched(), batches()[0][0]
    maps, run = coordinate_maps(model, x), reference(model, x)
    assert list(maps) == ["stem", "weight", "shared"]
    for site, images in maps.items():
        torch.testing.assert_close(images.double(), run[site][0][1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(24,), (6, 8), (4, 6, 8)])
def test_maps_of_any_dimension_are_drawn(size: tuple[int, ...], tmp_path: Path) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
    model = ccp.patch(nn.Sequential(kind(1, 5, 3), nn.ReLU(), kind(5, 1, 1)), "all")
    nn.init.normal_(model[0].coord_weight)
    ccp.plot_coords(model, tmp_path / "maps.png", torch.rand(1, 1, *size), channels=4)
    assert png_size(tmp_path / "maps.png")[1] > 250


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda m, p: ccp.influence(Net(), batches(), loss_fn), ccp.PatchError, "not patched|no coord"),
    (lambda m, p: ccp.influence(m, [], loss_fn), ccp.ArgumentError, "pass at least one"),
    (lambda m, p: ccp.influence(m, torch.rand(2, 2, 8, 8)), ccp.ArgumentError, r"\[images\]"),
    (lambda m, p: ccp.influence(m, 3), ccp.ArgumentError, r"\[images\]"),
    (lambda m, p: ccp.influence(m, batches(), 3), ccp.ArgumentError, "loss_fn=3"),
    (lambda m, p: ccp.influence(m, batches(), lambda m, b: b[1]), ccp.ArgumentError, "its mean"),
    (
        lambda m, p: ccp.influence(m, batches(), lambda m, b: None),
        ccp.ArgumentError,
        "return one number",
    ),
    (
        lambda m, p: ccp.influence(m, batches(), lambda m, b: loss_fn(m, b) * math.nan),
        *(ccp.PatchError, "loss_fn returned nan for one of the batches"),
    ),
    (
        lambda m, p: ccp.influence(m, batches(1), lambda m, b: loss_fn(m, b) * math.inf),
        *(ccp.PatchError, "loss_fn returned inf for one of the batches"),
    ),
    (
        lambda m, p: ccp.influence(m, batches(), lambda m, b: loss_fn(m, b) * 1j),
        *(ccp.ArgumentError, "loss_fn returned .*complex64: return a real number"),
    ),
    (
        lambda m, p: ccp.influence(m, batches(), nn.MSELoss),
        *(ccp.ArgumentError, "loss_fn=MSELoss is a class"),
    ),
    (
        lambda m, p: ccp.influence(m, [None], lambda m, b: m(b).mean()),
        *(ccp.PatchError, "loss_fn failed on one of the batches"),
    ),
    (
        lambda m, p: ccp.influence(m, [batches()[0][0] * math.nan]),
        *(ccp.PatchError, "stem gives values that are not finite"),
    ),
    (lambda m, p: ccp.influence(m, [torch.rand(1, 5, 8, 8)]), ccp.PatchError, r"\(1, 5, 8, 8\)"),
    (lambda m, p: ccp.plot_coords(m, p / "m.gif", batches()[0][0]), ccp.ArgumentError, r"\.png"),
    (
        lambda m, p: ccp.plot_coords(m, p / "m.png", batches()[0][0], sites=["norm"]),
        *(ccp.SelectionError, "'norm' has no coordinates.*stem, weight, shared"),
    ),
    (
        lambda m, p: ccp.plot_coords(m, p / "m.png", batches()[0][0], channels=0),
        *(ccp.ArgumentError, "1 to 256"),
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(
    call: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        call(patched(), tmp_path)
    assert list(tmp_path.iterdir()) == []
