"""Coordinate weights in a file: the round trip, and every refusal with its reason."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import pickle
import resource
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coords_file_fuzz import state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel

import coordconv_patch as ccp
from coordconv_patch.errors import WeightsError
from coordconv_patch.files.tensor_file import tensor_file_bytes
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.weights import save_load as weights_module
from coordconv_patch.weights.save_load import fingerprint


class Net(nn.Module):
    """Two convolutions around a batch norm; one has a preset's name."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.stem(x))))


class Functional(nn.Module):
    """A convolution module, then a functional convolution called by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(2, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(self.conv(x)), self.kernel)


class Nested(nn.Module):
    """A body that can be wrapped on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net()
        self.tail = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


def fresh(make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(generator=generator)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def patched() -> nn.Module:
    return filled(ccp.patch(fresh(), "all"))


@pytest.fixture
def saved(patched: nn.Module, tmp_path: Path) -> Path:
    return ccp.save_coords(patched, tmp_path / "coords.safetensors")


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()["coordconv_patch"])


def rewritten(path: Path, header: object, tensors: dict[str, Tensor] | None = None) -> Path:
    """A copy of the file with another header or other tensors, and the checksum of these."""
    other = path.with_name("rewritten.safetensors")
    text = header if isinstance(header, str) else json.dumps(header)
    stored = load_file(path) if tensors is None else tensors
    other.write_bytes(tensor_file_bytes(text, stored, "coordconv_patch"))
    return other


def without_checksum(path: Path, header: object) -> Path:
    """As an early version wrote it, or somebody who knows nothing of checksums."""
    other = path.with_name("rewritten.safetensors")
    save_file(load_file(path), other, metadata={"coordconv_patch": json.dumps(header)})
    return other


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [type(module) for module in model.modules()]


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    state, classes = before
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def assert_refused(path: Path, reason: str, model: nn.Module | None = None) -> None:
    """Both forms refuse the file for the reason, and the one in place changes nothing."""
    model = fresh() if model is None else model
    before = snapshot(model)
    for load in (ccp.load_coords, ccp.load_coords_):
        with pytest.raises(WeightsError, match=reason):
            load(model, path)
        assert_unchanged(model, before)


# --- the round trip -----------------------------------------------------------------------------


def test_loading_onto_a_fresh_model_patches_and_fills_it(
    patched: nn.Module, saved: Path, x: Tensor
) -> None:
    model = fresh()
    before = snapshot(model)
    loaded = ccp.load_coords(model, saved)
    assert loaded is not model
    assert type(loaded) is Net
    assert torch.equal(loaded(x), patched(x))
    assert not torch.equal(loaded(x), model(x))
    assert_unchanged(model, before)


def test_loading_in_place_returns_the_model_itself(
    patched: nn.Module, saved: Path, x: Tensor
) -> None:
    model = fresh()
    assert ccp.load_coords_(model, saved) is model
    assert torch.equal(model(x), patched(x))


def test_loading_onto_a_patched_model_fills_it_and_keeps_its_parameters(
    patched: nn.Module, saved: Path, x: Tensor
) -> None:
    model = ccp.patch(fresh(), "all")
    parameters = ccp.coord_parameters(model)
    ccp.load_coords_(model, saved)
    assert all(
        a is b for a, b in zip(ccp.coord_parameters(model), parameters, strict=True)
    )  # an optimizer built before still holds them
    assert torch.equal(model(x), patched(x))


def test_loading_onto_a_partly_patched_model_patches_the_rest(
    patched: nn.Module, saved: Path, x: Tensor
) -> None:
    model = ccp.load_coords_(ccp.patch(fresh(), "head"), saved)
    assert torch.equal(model(x), patched(x))


def test_maps_cached_before_loading_are_not_used_after_it(
    patched: nn.Module, saved: Path, x: Tensor
) -> None:
    model = ccp.patch(fresh(), "all")
    with torch.no_grad():
        model(x)
        ccp.load_coords_(model, saved)
        assert torch.equal(model(x), patched(x))


@pytest.mark.parametrize("names", [["head"], ["stem"], ["stem", "head"]])
def test_only_the_saved_sites_are_patched(names: list[str], tmp_path: Path, x: Tensor) -> None:
    source = filled(ccp.patch(fresh(), names))
    loaded = ccp.load_coords(fresh(), ccp.save_coords(source, tmp_path / "c.safetensors"))
    assert list(coord_layers(loaded)) == list(coord_layers(source))
    assert torch.equal(loaded(x), source(x))


@pytest.mark.parametrize("name", ["first", "all", "stem", "neck", "head"])
def test_a_site_named_like_a_selector_is_still_that_site(
    name: str, tmp_path: Path, x: Tensor
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = {"entry": nn.Conv2d(3, 3, 3, padding=1), name: nn.Conv2d(3, 3, 1)}
        return _sequence(layers)

    source = filled(ccp.patch(make(), lambda site: site.name == name))
    assert list(coord_layers(source)) == [name]
    loaded = ccp.load_coords(make(), ccp.save_coords(source, tmp_path / "c.safetensors"))
    assert list(coord_layers(loaded)) == [name]
    assert torch.equal(loaded(x), source(x))


def _sequence(layers: dict[str, nn.Module]) -> nn.Sequential:
    sequence = nn.Sequential()
    for name, layer in layers.items():
        sequence.add_module(name, layer)
    return sequence.eval()


def test_two_conventions_in_one_model_come_back(tmp_path: Path, x: Tensor) -> None:
    source = ccp.patch(fresh(), "stem", coords=ccp.Coordinates(radius=True))
    source = filled(ccp.patch(source, "head", coords="mkocabas"))
    loaded = ccp.load_coords(fresh(), ccp.save_coords(source, tmp_path / "c.safetensors"))
    assert loaded.stem.coords == ccp.Coordinates(radius=True)
    assert loaded.head.coords == source.head.coords != ccp.Coordinates()
    assert torch.equal(loaded(x), source(x))


def test_windows_are_part_of_the_convention_saved(tmp_path: Path, x: Tensor) -> None:
    window = ccp.Window((1, 2), (8, 10), (16, 30))
    source = filled(ccp.patch(fresh(), "stem", coords=ccp.Coordinates(window=window)))
    loaded = ccp.load_coords(fresh(), ccp.save_coords(source, tmp_path / "c.safetensors"))
    assert loaded.stem.coords.window == window
    assert torch.equal(loaded(x), source(x))


def test_a_convolution_under_two_names_is_saved_once(tmp_path: Path, x: Tensor) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        model.add_module("again", model[0])
        return model.eval()

    source = filled(ccp.patch(make(), "all"))
    path = ccp.save_coords(source, tmp_path / "c.safetensors")
    assert list(load_file(path)) == ["0.coord_weight"]
    loaded = ccp.load_coords(make(), path)
    assert loaded[0] is loaded.again
    assert torch.equal(loaded(x), source(x))


def test_weights_tied_between_convolutions_stay_tied(tmp_path: Path, x: Tensor) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
        model[1].weight = model[0].weight
        return model.eval()

    source = filled(ccp.patch(make(), "all"))
    loaded = ccp.load_coords(make(), ccp.save_coords(source, tmp_path / "c.safetensors"))
    assert loaded[0].weight is loaded[1].weight
    assert not torch.equal(loaded[0].coord_weight, loaded[1].coord_weight)
    assert torch.equal(loaded(x), source(x))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_kind_of_convolution_round_trips(ndim: int, transposed: bool, tmp_path: Path) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{ndim}d")

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(kind(2, 4, 3, stride=2, padding=1, groups=2)).eval()

    source = filled(ccp.patch(make(), "all"))
    loaded = ccp.load_coords(make(), ccp.save_coords(source, tmp_path / "c.safetensors"))
    signal = torch.randn(2, 2, *(5, 6, 7)[:ndim])
    assert torch.equal(loaded(signal), source(signal))


def test_half_precision_weights_keep_their_dtype(tmp_path: Path) -> None:
    source = filled(ccp.patch(fresh().bfloat16(), "all"))
    path = ccp.save_coords(source, tmp_path / "c.safetensors")
    assert load_file(path)["stem.coord_weight"].dtype is torch.bfloat16
    loaded = ccp.load_coords(fresh().bfloat16(), path)
    assert torch.equal(loaded.stem.coord_weight, source.stem.coord_weight)


# --- batch norm ---------------------------------------------------------------------------------


def test_batch_norm_statistics_are_included_on_request(tmp_path: Path, x: Tensor) -> None:
    source = filled(ccp.patch(fresh(), "all")).train()
    for _ in range(3):
        source(x + 1)
    source.eval()
    with_norms = ccp.save_coords(source, tmp_path / "with.safetensors", include_batch_norm=True)
    without = ccp.save_coords(source, tmp_path / "without.safetensors")
    loaded = ccp.load_coords(fresh(), with_norms)
    assert torch.equal(loaded(x), source(x))
    assert loaded.bn.num_batches_tracked == 3
    plain = ccp.load_coords(fresh(), without)
    assert torch.equal(plain.bn.running_mean, fresh().bn.running_mean)
    assert not torch.equal(plain(x), source(x))


def test_norm_statistics_of_another_model_are_refused(saved: Path) -> None:
    def with_tensor(name: str, tensor: Tensor) -> Path:
        return rewritten(saved, header_of(saved), load_file(saved) | {name: tensor})

    other = with_tensor("bn9.running_mean", torch.zeros(4))
    assert_refused(other, r"has bn9\.running_mean, which this model does not have")
    other = with_tensor("bn.running_mean", torch.zeros(5))
    assert_refused(other, r"bn\.running_mean: shape \(5,\) in the file, \(4,\) in the model")
    other = with_tensor("bn.running_mean", torch.zeros(4, dtype=torch.int64))
    assert_refused(other, r"bn\.running_mean: dtype torch\.int64 in the file, torch\.float32 in")
    other = with_tensor("bn.num_batches_tracked", torch.tensor(2.0))
    assert_refused(other, r"bn\.num_batches_tracked: dtype torch\.float32 in the file")
    other = with_tensor("bn.running_var", torch.full((4,), torch.nan))
    assert_refused(other, r"bn\.running_var holds values that are not finite")


# --- what is in the file ------------------------------------------------------------------------


def test_the_file_is_safetensors_with_the_coordinate_weights_alone(
    patched: nn.Module, saved: Path
) -> None:
    raw = saved.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + length])["stem.coord_weight"]["shape"] == [4, 2, 3, 3]
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(raw)
    tensors = load_file(saved)
    assert set(tensors) == {"stem.coord_weight", "head.coord_weight"}
    assert torch.equal(tensors["head.coord_weight"], patched.head.coord_weight)


def test_the_metadata_names_versions_sites_and_base(saved: Path) -> None:
    header = header_of(saved)
    assert header["format"] == "coordconv_patch"
    assert header["format_version"] == 3
    assert header["package_version"] == ccp.__version__
    assert header["fingerprint"] == fingerprint(fresh())
    assert list(header["sites"]) == ["stem", "head"]
    geometry = header["sites"]["head"]["geometry"]
    assert geometry["kernel_size"] == [3, 3]
    assert geometry["stride"] == [2, 2]
    assert geometry["in_channels"] == 4
    assert ccp.Coordinates.from_dict(header["sites"]["head"]["coords"]) == ccp.Coordinates()


def test_saving_changes_nothing_and_returns_the_path(patched: nn.Module, tmp_path: Path) -> None:
    before = snapshot(patched)
    path = ccp.save_coords(patched, str(tmp_path / "c.safetensors"))
    assert path == tmp_path / "c.safetensors"
    assert_unchanged(patched, before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_file_has_the_permissions_that_the_umask_leaves(
    mask: int, patched: nn.Module, tmp_path: Path
) -> None:
    previous = os.umask(mask)
    try:
        path = ccp.save_coords(patched, tmp_path / "c.safetensors")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_an_interrupted_write_leaves_the_old_file_whole(
    patched: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def interrupted(path: Path, raw: bytes) -> None:
        with open(path, "wb") as file:
            file.write(raw[: len(raw) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ccp.save_coords(filled(patched, seed=5), saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_saving_replaces_an_older_file_and_leaves_no_other(saved: Path, x: Tensor) -> None:
    newer = filled(ccp.patch(fresh(), "all"), seed=9)
    ccp.save_coords(newer, saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert torch.equal(ccp.load_coords(fresh(), saved)(x), newer(x))


def test_an_unpatched_model_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nothing to save: .*patch it first"):
        ccp.save_coords(fresh(), tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_into_a_missing_folder_is_refused(patched: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"the folder .*missing does not exist"):
        ccp.save_coords(patched, tmp_path / "missing" / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_onto_a_folder_is_refused(patched: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "c.safetensors"
    folder.mkdir()
    with pytest.raises(WeightsError, match="folder"):
        ccp.save_coords(patched, folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


# --- wrappers -----------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_is_seen_through(
    process_group: None, patched: nn.Module, tmp_path: Path, x: Tensor
) -> None:
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(patched))
    path = ccp.save_coords(wrapped, tmp_path / "c.safetensors")
    assert set(load_file(path)) == {"stem.coord_weight", "head.coord_weight"}
    assert torch.equal(ccp.load_coords(fresh(), path)(x), patched(x))
    empty = nn.parallel.DistributedDataParallel(ccp.patch(fresh(), "all"))
    assert ccp.load_coords_(empty, path) is empty
    assert torch.equal(empty(x), patched(x))


def wrap_compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "average": AveragedModel,
    "compiled": wrap_compiled,
    "average of data parallel": lambda model: AveragedModel(nn.DataParallel(model)),
    "compiled average": lambda model: wrap_compiled(AveragedModel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_leave_no_trace_in_the_file(
    wrapper: str, patched: nn.Module, saved: Path, tmp_path: Path
) -> None:
    path = ccp.save_coords(WRAPPERS[wrapper](patched), tmp_path / "w.safetensors")
    assert header_of(path) == header_of(saved)
    assert set(load_file(path)) == set(load_file(saved))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_load_onto_a_wrapped_model_of_its_class(
    wrapper: str, patched: nn.Module, saved: Path, x: Tensor
) -> None:
    target = WRAPPERS[wrapper](fresh())
    loaded = ccp.load_coords(target, saved)
    assert type(loaded) is type(target)
    assert torch.equal(loaded(x), patched(x))
    assert not torch.equal(target(x), patched(x))
    assert ccp.load_coords_(target, saved) is target
    assert torch.equal(target(x), patched(x))


def test_a_compiled_submodule_has_the_names_of_the_bare_one(tmp_path: Path, x: Tensor) -> None:
    source = filled(ccp.patch(fresh(Nested), "all"))
    expected = source(x)
    source.body = wrap_compiled(source.body)
    path = ccp.save_coords(source, tmp_path / "c.safetensors")
    assert set(header_of(path)["sites"]) == {"body.stem", "body.head", "tail"}
    assert torch.equal(ccp.load_coords(fresh(Nested), path)(x), expected)
    target = fresh(Nested)
    target.body = wrap_compiled(target.body)
    assert torch.equal(ccp.load_coords(target, path)(x), expected)


# --- graphs -------------------------------------------------------------------------------------


def test_weights_travel_between_module_graph_module_and_exported_program(
    patched: nn.Module, saved: Path, tmp_path: Path, x: Tensor
) -> None:
    def program() -> fx.GraphModule:
        return torch.export.export(fresh(), (x,)).module()

    for label, make in {"graph": lambda: fx.symbolic_trace(fresh()), "program": program}.items():
        loaded = ccp.load_coords(make(), saved)
        torch.testing.assert_close(loaded(x), patched(x), atol=1e-6, rtol=0)
        path = ccp.save_coords(filled(ccp.patch(make(), "all")), tmp_path / f"{label}.safetensors")
        assert header_of(path)["fingerprint"] == header_of(saved)["fingerprint"]
        back = ccp.load_coords(fresh(), path)
        assert torch.equal(back.stem.coord_weight, patched.stem.coord_weight)
        assert torch.equal(back(x), patched(x))


def test_a_functional_convolution_round_trips_onto_the_plain_model(
    tmp_path: Path, x: Tensor
) -> None:
    source = filled(ccp.patch(fresh(Functional), "all"))
    path = ccp.save_coords(source, tmp_path / "c.safetensors")
    assert set(load_file(path)) == {"conv.coord_weight", "kernel.coord_weight"}
    loaded = ccp.load_coords(fresh(Functional), path)
    assert torch.equal(loaded(x), source(x))


def test_two_conventions_with_a_functional_convolution_come_back(tmp_path: Path, x: Tensor) -> None:
    source = ccp.patch(fresh(Functional), "conv")
    source = filled(ccp.patch(source, "kernel", coords=ccp.Coordinates(radius=True)))
    path = ccp.save_coords(source, tmp_path / "c.safetensors")
    assert torch.equal(ccp.load_coords(fresh(Functional), path)(x), source(x))


def test_two_conventions_with_a_functional_convolution_come_back_in_place(
    tmp_path: Path, x: Tensor
) -> None:
    source = ccp.patch(fresh(Functional), "conv")
    source = filled(ccp.patch(source, "kernel", coords=ccp.Coordinates(radius=True)))
    path = ccp.save_coords(source, tmp_path / "c.safetensors")
    target = fresh(Functional)
    assert ccp.load_coords_(target, path) is target
    assert torch.equal(target(x), source(x))


# --- refusals: the model ------------------------------------------------------------------------


def test_another_base_is_refused_unless_told_otherwise(
    patched: nn.Module, saved: Path, x: Tensor
) -> None:
    other = fresh()
    with torch.no_grad():
        other.head.bias[1] += 1
    found = fingerprint(other)[:12]
    assert_refused(
        saved, rf"belongs to a model with other weights .*this model's is {found}", other
    )
    loaded = ccp.load_coords(other, saved, check_base=False)
    assert torch.equal(loaded.stem.coord_weight, patched.stem.coord_weight)
    assert ccp.load_coords_(other, saved, check_base=False) is other


def test_a_missing_site_is_refused_by_name(saved: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    assert_refused(saved, "has coordinate weights for stem, head, which this model does not", model)


def test_a_further_patched_site_is_refused_by_name(tmp_path: Path) -> None:
    path = ccp.save_coords(filled(ccp.patch(fresh(), "head")), tmp_path / "c.safetensors")
    model = ccp.patch(fresh(), "all")
    assert_refused(path, "patched at stem, for which .* has no weights", model)


def test_a_changed_geometry_is_refused_with_both(saved: Path) -> None:
    model = fresh(lambda: Net(stride=1))
    assert_refused(saved, "head: the file was saved for a convolution .* s2, this model", model)


def test_another_convention_is_refused_with_both(saved: Path) -> None:
    model = ccp.patch(fresh(), "all", coords="mkocabas")
    assert_refused(saved, "stem: the file uses coordinates .*, the model is patched with", model)


def test_a_site_that_cannot_carry_coordinates_is_refused_with_the_reason(saved: Path) -> None:
    model = fresh()
    model.head.forward = model.head.forward
    assert_refused(saved, "head cannot be patched: its forward is replaced", model)


# --- refusals: the file -------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nothing.safetensors", r"there is no file .*nothing\.safetensors")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(kept: float, saved: Path) -> None:
    raw = saved.read_bytes()
    saved.write_bytes(raw[: int(len(raw) * kept)])
    assert_refused(saved, "is not a safetensors file, or a truncated one")


def test_a_file_cut_by_one_byte_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    assert_refused(saved, "truncated")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not weights at all\n" * 20)
    pickled = tmp_path / "weights.pkl"
    pickled.write_bytes(pickle.dumps({"stem.coord_weight": [0.0]}))
    archive = tmp_path / "weights.pth"
    torch.save(fresh().state_dict(), archive)
    for path in (text, pickled, archive, tmp_path):
        assert_refused(path, "is not a safetensors file, or a truncated one")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_something_else_is_refused(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(fresh().state_dict(), path, metadata=metadata)
    assert_refused(path, "not one of coordinate weights; .*load_state_dict")


def test_a_newer_format_names_the_remedy(saved: Path) -> None:
    header = header_of(saved) | {"format_version": 4, "package_version": "9.9"}
    header["sites"] = "of another kind"
    reason = r"format version 4, .* up to 3: update coordconv-patch .*9\.9"
    assert_refused(rewritten(saved, header), reason)
    assert_refused(without_checksum(saved, header), reason)
    other = rewritten(saved, header)
    raw = bytearray(other.read_bytes())
    raw[-1] ^= 1  # a newer format may make its checksum otherwise
    other.write_bytes(raw)
    assert_refused(other, reason)


def without(header: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in header.items() if name != key}


def with_site(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    stem = header["sites"]["stem"] | changes
    return header | {"sites": header["sites"] | {"stem": stem}}


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no json": lambda header: "{",
    "null": lambda header: None,
    "a list": lambda header: [1],
    "no version": lambda header: without(header, "format_version"),
    "version in words": lambda header: header | {"format_version": "one"},
    "no fingerprint": lambda header: without(header, "fingerprint"),
    "no sites": lambda header: without(header, "sites"),
    "sites in a list": lambda header: header | {"sites": ["stem"]},
    "site without geometry": lambda header: header | {"sites": {"stem": {}}},
    "geometry null": lambda header: with_site(header, geometry=None),
    "geometry unknown field": lambda header: with_site(header, geometry={"holes": 3}),
    "geometry no kernel": lambda header: with_site(
        header, geometry=header["sites"]["stem"]["geometry"] | {"kernel_size": 3}
    ),
    "coords null": lambda header: with_site(header, coords=None),
    "coords impossible": lambda header: with_site(header, coords={"order": "zz"}),
    "coords unknown field": lambda header: with_site(header, coords={"spiral": True}),
    "weight not stored": lambda header: (
        header | {"sites": header["sites"] | {"lost": header["sites"]["stem"]}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_header_is_a_weights_error_that_names_the_file(damage: str, saved: Path) -> None:
    other = rewritten(saved, DAMAGE[damage](header_of(saved)))
    assert_refused(other, r"rewritten\.safetensors|this model has|newer version")


def test_a_weight_of_another_shape_than_its_header_says_is_refused(saved: Path) -> None:
    tensors = load_file(saved) | {"stem.coord_weight": torch.zeros(4, 3, 3, 3)}
    other = rewritten(saved, header_of(saved), tensors)
    assert_refused(
        other, r"weight of stem has shape \(4, 3, 3, 3\), its header says \(4, 2, 3, 3\)"
    )


def test_the_same_weights_give_the_same_bytes(
    patched: nn.Module, saved: Path, tmp_path: Path
) -> None:
    for _ in range(8):  # the order of a hash map would differ from one to the next
        again = ccp.save_coords(patched, tmp_path / "again.safetensors")
        assert again.read_bytes() == saved.read_bytes()


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, (np.int64(3), 1), padding=(np.int32(1), 0)))

    source = filled(ccp.patch(make(), "all"))
    loaded = ccp.load_coords(make(), ccp.save_coords(source, tmp_path / "c.safetensors"))
    assert torch.equal(loaded[0].coord_weight, source[0].coord_weight)


def test_a_subclass_of_a_convention_is_not_saved_as_its_base(
    patched: nn.Module, tmp_path: Path
) -> None:
    sneaky = type("Twice", (ccp.Coordinates,), {"__post_init__": lambda self: None})
    patched.stem.coords = sneaky()
    with pytest.raises(WeightsError, match="cannot be saved: Twice is a subclass of Coordinates"):
        ccp.save_coords(patched, tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, 500])
def test_a_file_that_cannot_grow_is_an_error_with_the_path(
    limit: int, patched: nn.Module, saved: Path
) -> None:
    before = saved.read_bytes()
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, previous[1]))
    try:
        with pytest.raises(WeightsError, match=r"cannot write .*safetensors: File too large"):
            ccp.save_coords(patched, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_model_without_memory_cannot_be_filled(saved: Path) -> None:
    with torch.device("meta"):
        model = Net().eval()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(WeightsError, match=r"stem .*meta device: load the model's own weights"):
        ccp.load_coords_(model, saved, check_base=False)
    assert [type(module) for module in model.modules()] == classes


# --- the checksum -------------------------------------------------------------------------------


def flipped(path: Path, index: int, bit: int = 0x40) -> Path:
    raw = bytearray(path.read_bytes())
    raw[index] ^= bit
    other = path.with_name("flipped.safetensors")
    other.write_bytes(raw)
    return other


def test_a_flipped_bit_of_a_weight_is_refused(saved: Path) -> None:
    start = 8 + int.from_bytes(saved.read_bytes()[:8], "little")
    for index in (start, start + 3, -1):
        assert_refused(flipped(saved, index), r"flipped\.safetensors: it is damaged: .*checksum")


def test_no_flipped_bit_passes(saved: Path) -> None:
    """Every 37th bit of the file, the container's own included."""
    raw = saved.read_bytes()
    for place in range(0, 8 * len(raw), 37):
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        saved.write_bytes(changed)
        with pytest.raises(WeightsError):
            ccp.load_coords_(fresh(), saved)


def test_a_checksum_cannot_be_left_out(saved: Path) -> None:
    assert_refused(without_checksum(saved, header_of(saved)), "its checksum is missing")


def test_a_file_does_not_become_an_old_one_by_its_version_alone(saved: Path) -> None:
    raw = saved.read_bytes()
    changed = raw.replace(rb"\"format_version\": 3", rb"\"format_version\": 1")
    assert changed != raw
    saved.write_bytes(changed)
    assert_refused(saved, "it is damaged: .*checksum")


def test_a_checksum_under_another_name_is_not_overlooked(saved: Path) -> None:
    header = header_of(saved) | {"format_version": 1}
    metadata = {"coordconv_patch": json.dumps(header), "coordconv_patch.checksun": "0" * 64}
    save_file(load_file(saved), saved, metadata=metadata)
    assert_refused(saved, "metadata has an unknown entry 'coordconv_patch.checksun'")


def early_version(saved: Path, version: int = 1) -> Path:
    return without_checksum(saved, header_of(saved) | {"format_version": version})


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_an_early_version_loads_with_a_note(
    version: int, patched: nn.Module, saved: Path, x: Tensor
) -> None:
    old = early_version(saved, version)
    for load in (ccp.load_coords, ccp.load_coords_):
        with pytest.warns(UserWarning, match=r"rewritten\.safetensors has no checksum") as noted:
            loaded = load(fresh(), old)
        assert torch.equal(loaded(x), patched(x))
        assert [Path(note.filename) for note in noted] == [Path(__file__)]
    newer = ccp.save_coords(loaded, saved)  # as the note advises
    assert torch.equal(ccp.load_coords(fresh(), newer)(x), patched(x))


def test_a_file_with_a_checksum_loads_without_a_note(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ccp.load_coords(fresh(), saved)


def test_a_note_that_is_an_error_leaves_the_model_alone(saved: Path) -> None:
    old, model = early_version(saved), fresh()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has no checksum"):
            ccp.load_coords_(model, old)
    assert_unchanged(model, before)


def test_a_file_of_an_early_version_is_read_as_strictly(saved: Path) -> None:
    header = with_site(header_of(saved), coords={"radius": 5}) | {"format_version": 1}
    assert_refused(without_checksum(saved, header), "radius=5: write True or False")


# --- strict types -------------------------------------------------------------------------------

CALLS = {"indices": [0, 2], "total": 3, "caller": ""}
DEEP = json.loads("[" * 400 + "]" * 400)
RANGE = "write two finite numbers"

WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{
        f"version {value!r}": (
            lambda header, value=value: header | {"format_version": value},
            "format_version must be a whole number from 1|is not valid JSON",
        )
        for value in (math.nan, math.inf, -1, 0, 1.5, 3.0, True, "3", None, [3])
    },
    "format": (
        lambda header: header | {"format": "other"},
        "format must be one of coordconv_",
    ),
    "package": (lambda header: header | {"package_version": 1}, "package_version must be a text"),
    "fingerprint": (lambda header: header | {"fingerprint": "f" * 63}, "64 hexadecimal digits"),
    "fingerprint type": (lambda header: header | {"fingerprint": 1}, "fingerprint must be a text"),
    "unknown": (lambda header: header | {"spiral": 1}, "unknown field 'spiral': a newer version"),
    "no sites": (lambda header: header | {"sites": {}}, "sites must be an object of 1 to 10,000"),
    "deep": (lambda header: header | {"sites": DEEP}, "sites must be an object"),
    "deeper": (lambda header: "[" * 100_000, "nested too deeply"),
    "twice": (
        lambda header: json.dumps(header).replace('"sites"', '"format": "x", "sites"'),
        "the key 'format' stands in it twice",
    ),
    "a million digits": (
        lambda header: json.dumps(header).replace(
            '"out_channels": 4', '"out_channels": ' + "4" * 10**6
        ),
        "a number of 1000000 digits",
    ),
    "record": (lambda header: with_site(header, spiral=1), "site 'stem': .*unknown field 'spiral'"),
    "calls null": (
        lambda header: with_site(header, calls=None),
        "calls must be an object, not",
    ),
}
for _name, _value, _reason in (
    ("transposed", 0, "transposed must be true or false"),
    ("in_channels", True, "in_channels must be a whole number"),
    ("in_channels", 3.0, "in_channels must be a whole number"),
    ("out_channels", -4, "out_channels must be a whole number"),
    ("out_channels", 2**31, "out_channels must be a whole number"),
    ("kernel_size", [3, True], "kernel_size must be a whole number"),
    ("kernel_size", [3, 0], "kernel_size must be a whole number from 1"),
    ("kernel_size", [3] * 4, "kernel_size must be a list of 1 to 3 numbers"),
    ("kernel_size", [3] * 100_000, "kernel_size must be a list of 1 to 3 numbers"),
    ("stride", [1], "stride must be a list of 2 numbers"),
    ("stride", [0, 1], "stride must be a whole number from 1"),
    ("stride", "11", "stride must be a list"),
    ("padding", "some", "padding must be one of same, valid"),
    ("padding", 1, "padding must be a list of 2 numbers"),
    ("padding", [1.0, 1], "padding must be a whole number"),
    ("dilation", [[1], 1], "dilation must be a whole number"),
    ("groups", 0, "groups must be a whole number from 1"),
    ("groups", 2, "groups=2 must divide in_channels=3"),
    ("padding_mode", "mirror", "padding_mode must be one of zeros"),
    ("output_padding", [0, 0], "output_padding must be a list of 0 numbers"),
    ("holes", 1, "geometry has an unknown field 'holes'"),
    ("holes" * 10_000, 1, "geometry has an unknown field 'holes"),
):
    WRONG[f"{_name[:20]} {str(_value)[:20]}"] = (
        lambda header, name=_name, value=_value: with_site(
            header, geometry=header["sites"]["stem"]["geometry"] | {name: value}
        ),
        _reason,
    )
for _coords, _reason in (
    ({"radius": 5}, "radius=5: write True or False"),
    ({"align_corners": 0}, "align_corners=0: write True or False"),
    ({"swap_sizes": "yes"}, "swap_sizes='yes': write True or False"),
    ({"fourier": 14000}, "fourier=14000: write a number of octaves"),
    ({"fourier": True}, "fourier=True: write a number of octaves"),
    ({"fourier": 2.0}, r"fourier=2\.0: write a number of octaves"),
    ({"order": ["x", "y"]}, "order=.*: write 'xy'"),
    ({"order": "x" * 100_000}, "order=.*: write 'xy'"),
    ({"value_range": [0, True]}, RANGE),
    ({"value_range": "01"}, RANGE),
    ({"value_range": [0, 1e300]}, RANGE),
    ({"value_range": [0] * 100_000}, RANGE),
    ({"radius": True, "radius_center": "0"}, "radius_center='0': write a finite number"),
    ({"radius_center": 0.5}, "radius_center is given, but radius=False"),
    (
        {"window": {"offset": [0], "size": [1], "image_size": [2]}},
        "has 1 dimensions, the input has 2",
    ),
    ({"window": {"offset": [0, 0], "size": [1, 1.5], "image_size": [2, 2]}}, "window: size="),
    ({"window": {"offset": [0, 0], "size": [1, 1]}}, "missing image_size"),
    ({"window": {"x" * 100_000: 1}}, "window: .*missing"),
    ({"window": 3}, "are invalid"),
    ([], "must be a mapping"),
    ({"x" * 100_000: 1}, "unknown coordinate fields"),
):
    WRONG[f"coords {str(_coords)[:40]}"] = (
        lambda header, coords=_coords: with_site(header, coords=coords),
        _reason,
    )
for _calls, _reason in (
    (CALLS | {"indices": []}, "indices must be a list of 1 to 3 numbers"),
    (CALLS | {"indices": [9]}, "indices must be a whole number from 0 to 2"),
    (CALLS | {"indices": [-1]}, "indices must be a whole number from 0 to 2"),
    (CALLS | {"indices": [2, 0]}, "indices must be in order, each call once"),
    (CALLS | {"indices": [1, 1]}, "indices must be in order, each call once"),
    (CALLS | {"indices": [True]}, "indices must be a whole number"),
    (CALLS | {"indices": "02"}, "indices must be a list"),
    (CALLS | {"total": 0}, "total must be a whole number from 1"),
    (CALLS | {"total": 10**9}, "total must be a whole number from 1"),
    (CALLS | {"total": 3.0}, "total must be a whole number"),
    (CALLS | {"caller": None}, "caller must be a text"),
    (CALLS | {"caller": "\ud800"}, "caller is not valid Unicode"),
    (CALLS | {"more": 1}, "calls has an unknown field 'more'"),
    ({"indices": [0]}, "calls has no field"),
    (CALLS | {"total": 4}, "this model's graph has 1 calls"),
    (
        {"indices": [0], "total": 1, "caller": "nowhere"},
        "'nowhere' runs, which this model",
    ),
):
    WRONG[f"calls {str(_calls)[:60]}"] = (
        lambda header, calls=_calls: with_site(header, calls=calls),
        _reason,
    )


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_field_is_refused_by_name_and_leaves_the_model_alone(
    wrong: str, saved: Path
) -> None:
    change, reason = WRONG[wrong]
    model = fresh()
    before = snapshot(model)
    with pytest.raises(WeightsError, match=reason) as refused:
        ccp.load_coords_(model, rewritten(saved, change(header_of(saved))))
    assert len(str(refused.value)) <= 1000
    assert_unchanged(model, before)


def test_names_that_a_file_holds_do_not_fill_a_message(saved: Path) -> None:
    header = header_of(saved)
    record = header["sites"]["stem"]
    for names, reason in (
        (["x" * 1001], "the name of a site must be a text of at most 1000"),
        (["\ud800"], "the name of a site is not valid Unicode"),
        ([f"{index}" * 900 for index in range(10)], "which this model does not have"),
    ):
        weights = {f"{name}.coord_weight": torch.zeros(4, 2, 3, 3) for name in names}
        if reason.endswith("Unicode"):
            weights = {"x": torch.zeros(1)}
        weights = {name[-1000:]: weight for name, weight in weights.items()}
        model = fresh()
        before = snapshot(model)
        path = rewritten(saved, header | {"sites": dict.fromkeys(names, record)}, weights)
        with pytest.raises(WeightsError, match=reason) as refused:
            ccp.load_coords_(model, path)
        assert len(str(refused.value)) <= 1000
        assert_unchanged(model, before)


# --- tensors that are no weights ----------------------------------------------------------------


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_neither_saved_nor_loaded(
    number: float, patched: nn.Module, saved: Path
) -> None:
    before = saved.read_bytes()
    tensors = load_file(saved)
    tensors["stem.coord_weight"][0, 1, 2, 0] = number
    assert_refused(
        rewritten(saved, header_of(saved), tensors), r"stem\.coord_weight holds .* not finite"
    )
    with torch.no_grad():
        patched.stem.coord_weight[0, 1, 2, 0] = number
    with pytest.raises(WeightsError, match=r"stem\.coord_weight holds .* not finite"):
        ccp.save_coords(patched, saved)
    assert saved.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_bits_of_another_dtype_are_not_read_as_weights(dtype: torch.dtype, saved: Path) -> None:
    tensors = load_file(saved)
    tensors["stem.coord_weight"] = tensors["stem.coord_weight"].to(dtype)
    assert_refused(
        rewritten(saved, header_of(saved), tensors), "dtype must be one of F64, F32, F16, BF16"
    )


def test_whole_numbers_are_no_coordinate_weights(saved: Path) -> None:
    tensors = load_file(saved)
    tensors["stem.coord_weight"] = tensors["stem.coord_weight"].long()
    assert_refused(rewritten(saved, header_of(saved), tensors), "of stem has dtype torch.int64")


def test_values_that_do_not_fit_into_the_models_dtype_are_refused(saved: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in load_file(saved).items()}
    tensors["stem.coord_weight"][0, 0, 0, 0] = 1e60
    path = rewritten(saved, header_of(saved), tensors)
    assert_refused(path, r"stem: values of up to 1e\+60 do not fit into .* torch\.float32")
    assert_refused(path, "do not fit", ccp.patch(fresh(), "head"))
    wide = fresh().double()
    loaded = ccp.load_coords(wide, path, check_base=False)
    assert loaded.stem.coord_weight.max() == 1e60


def test_weights_without_a_site_are_refused(saved: Path) -> None:
    tensors = load_file(saved) | {"more.coord_weight": torch.zeros(4, 2, 3, 3)}
    path = rewritten(saved, header_of(saved), tensors)
    assert_refused(path, r"has more\.coord_weight, which this model does not have")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "it is not a regular file")
    assert_refused(Path(os.devnull), "it is not a regular file")


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    path.touch()
    os.truncate(path, 2**31)  # sparse: it takes no room
    assert_refused(path, "it has more than 1,073,741,824 bytes")
    os.truncate(path, 2**30)
    assert_refused(path, "its header is not valid JSON|ask for a header of")
    with open(path, "r+b") as file:
        file.write((2**29).to_bytes(8, "little"))
    assert_refused(path, "ask for a header of 536,870,912 bytes")
    with open(path, "r+b") as file:
        file.write((2).to_bytes(8, "little") + b"{}")
    assert_refused(path, "do not fill it without gaps")


def container(entries: dict[str, Any], data: bytes = bytes(8)) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def tensor_entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (container({"a": tensor_entry(shape=[3])}), "its bytes must be a whole number from 12"),
        (container({"a": tensor_entry(shape=[2.0])}), "shape must be a whole number"),
        (container({"a": tensor_entry(shape=[2**31 - 1] * 8)}), "its bytes must be"),
        (container({"a": tensor_entry(shape=[1] * 9)}), "shape must be a list of 0 to 8"),
        (container({"a": tensor_entry(data_offsets=[8, 0])}), "its bytes must be"),
        (container({"a": tensor_entry(data_offsets=[0, 2**40])}), "offsets must be a whole number"),
        (container({"a": tensor_entry(), "b": tensor_entry()}), "without gaps"),
        (container({"a": tensor_entry()}, bytes(9)), "without gaps"),
        (container({"a": tensor_entry(data_offsets=[1, 9])}, bytes(9)), "without gaps"),
        (container({"a": tensor_entry(extra=1)}), "unknown field 'extra'"),
        (container({"a": 1}), "must be an object"),
        (container({"__metadata__": {"a": 1}}, b""), "metadata must be an object of texts"),
        (container({"__metadata__": []}, b""), "metadata must be an object of texts"),
        ((3).to_bytes(8, "little") + b"\xff\xfe{", "its header is not text"),
        (b"", "its header is not valid JSON"),
        (b"1234567", "ask for a header of"),
    ],
)
def test_a_wrong_container_is_refused_with_the_reason(
    raw: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(raw)
    assert_refused(path, f"not a safetensors file, or a truncated one .*{reason}")


# --- failures in the middle ---------------------------------------------------------------------


def chosen_calls_model() -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 3, 3, padding=1)
            self.d = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.c(x)))

    return Twice()


def graph_model() -> nn.Module:
    return fx.symbolic_trace(Functional())


STATES: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "plain": lambda: (fresh(), ccp.patch(fresh(), "all")),
    "partly patched": lambda: (
        filled(ccp.patch(fresh(), "head"), seed=4),
        ccp.patch(fresh(), "all"),
    ),
    "patched": lambda: (filled(ccp.patch(fresh(), "all"), seed=4), ccp.patch(fresh(), "all")),
    "chosen calls": lambda: (
        fresh(chosen_calls_model),
        ccp.patch(fresh(chosen_calls_model), ["c@1", "d"], example_inputs=torch.zeros(1, 3, 4, 4)),
    ),
    "graph": lambda: (fresh(graph_model), ccp.patch(fresh(graph_model), "all")),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["the fill", "the copy"])
@pytest.mark.parametrize("start", STATES)
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(
    start: str,
    at: str,
    error: type[BaseException],
    tmp_path: Path,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, source = STATES[start]()
    path = ccp.save_coords(filled(source), tmp_path / "c.safetensors")
    outputs = model(x)  # a forward may bring marks of weights up to date
    before = state(model)
    calls = itertools.count()

    def fail(*args: Any) -> Any:
        if at == "the fill" or next(calls) == 1:  # the second of two weights
            raise error("in the middle")
        return args[1]

    monkeypatch.setattr(weights_module, "_fill" if at == "the fill" else "_spread_like", fail)
    with pytest.raises(error, match="in the middle"):
        ccp.load_coords_(model, path)
    monkeypatch.undo()
    assert state(model) == before
    assert torch.equal(model(x), outputs)
    ccp.load_coords_(model, path)
    assert torch.equal(model(x), source(x))


def test_hooks_removed_after_a_failure_were_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks' handles hold the dicts that a failed load has to fill again."""
    model, source = STATES["chosen calls"]()
    path = ccp.save_coords(filled(source), tmp_path / "c.safetensors")
    handle = model.c.register_forward_hook(lambda *args: None)
    monkeypatch.setattr(weights_module, "_fill", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ccp.load_coords_(model, path)
    assert len(model.c._forward_hooks) == 1
    handle.remove()
    assert len(model.c._forward_hooks) == 0


# --- the fingerprint ----------------------------------------------------------------------------


def test_the_fingerprint_does_not_see_coordinates_or_buffers(x: Tensor) -> None:
    model = fresh()
    found = fingerprint(model)
    assert len(found) == 64
    assert fingerprint(filled(ccp.patch(model, "all"))) == found
    model.train()(x)
    assert fingerprint(model) == found


@pytest.mark.parametrize(
    "name", ["stem.weight", "bn.weight", "bn.bias", "head.weight", "head.bias"]
)
def test_the_fingerprint_changes_with_any_weight(name: str) -> None:
    model = fresh()
    found = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-3
    assert fingerprint(model) != found


def test_the_fingerprint_sees_names_shapes_and_dtypes() -> None:
    def single(name: str, tensor: Tensor) -> str:
        model = nn.Module()
        model.register_parameter(name, nn.Parameter(tensor))
        return fingerprint(model)

    found = single("a", torch.zeros(2, 3))
    assert single("a", torch.zeros(2, 3)) == found
    assert single("b", torch.zeros(2, 3)) != found
    assert single("a", torch.zeros(3, 2)) != found
    assert single("a", torch.zeros(2, 3, dtype=torch.int32).float().double()[:, :3]) != found


def test_the_fingerprint_does_not_depend_on_memory_layout() -> None:
    model = fresh()
    assert fingerprint(copy.deepcopy(model).to(memory_format=torch.channels_last)) == fingerprint(
        model
    )


def test_a_model_on_the_meta_device_has_a_fingerprint() -> None:
    with torch.device("meta"):
        model = Net()
    assert len(fingerprint(model)) == 64
