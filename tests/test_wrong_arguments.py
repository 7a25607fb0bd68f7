"""Wrong arguments of the public functions: the error names them, and nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.errors import CoordConvPatchError
from coordconv_patch.export.targets import register_target
from coordconv_patch.lowering.registry import register_lowering

X = torch.zeros(2, 3, 8, 8)


class Given(SimpleNamespace):
    """What a wrong call may need besides its wrong argument."""

    plain: nn.Module
    patched: nn.Module
    optimizer: torch.optim.Optimizer
    folder: Path
    coords: Path


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


@pytest.fixture
def given(tmp_path: Path) -> Given:
    patched = ccp.patch(net(), "first")
    coords = ccp.save_coords(patched, tmp_path / "coords.safetensors")
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    return Given(plain=net(), patched=patched, optimizer=optimizer, folder=tmp_path, coords=coords)


TAKES_A_MODULE: dict[str, Callable[[Any, Given], Any]] = {
    "patch": lambda wrong, _: ccp.patch(wrong, "first"),
    "patch with inputs": lambda wrong, _: ccp.patch(wrong, "all", example_inputs=X),
    "patch_": lambda wrong, _: ccp.patch_(wrong, "first"),
    "plan": lambda wrong, _: ccp.plan(wrong, "first"),
    "unpatch": lambda wrong, _: ccp.unpatch(wrong),
    "unpatch_": lambda wrong, _: ccp.unpatch_(wrong),
    "import_coordconv": lambda wrong, _: ccp.import_coordconv(wrong, X),
    "import_coordconv_": lambda wrong, _: ccp.import_coordconv_(wrong),
    "load_concatenated": lambda wrong, _: ccp.load_concatenated(wrong, {}),
    "load_concatenated_": lambda wrong, _: ccp.load_concatenated_(wrong, {}),
    "to_concatenated": lambda wrong, _: ccp.to_concatenated(wrong),
    "set_window_": lambda wrong, _: ccp.set_window_(wrong, None),
    "coord_parameters": lambda wrong, _: ccp.coord_parameters(wrong),
    "param_groups": lambda wrong, _: ccp.param_groups(wrong, lr=0.1),
    "train_only_coords_": lambda wrong, _: ccp.train_only_coords_(wrong),
    "add_to_optimizer_": lambda wrong, given: ccp.add_to_optimizer_(given.optimizer, wrong),
    "save_coords": lambda wrong, given: ccp.save_coords(wrong, given.folder / "other.safetensors"),
    "save_pretrained": lambda wrong, given: ccp.save_pretrained(wrong, given.folder / "other"),
    "from_pretrained": lambda wrong, given: ccp.from_pretrained(wrong, given.folder),
    "load_coords": lambda wrong, given: ccp.load_coords(wrong, given.coords),
    "load_coords_": lambda wrong, given: ccp.load_coords_(wrong, given.coords),
    "fold": lambda wrong, _: ccp.fold(wrong),
    "fold_with": lambda wrong, _: ccp.fold_with(wrong, lambda model: model),
    "export_onnx": lambda wrong, given: ccp.export_onnx(wrong, given.folder / "a.onnx", X),
    "verify_onnx": lambda wrong, given: ccp.verify_onnx(wrong, given.folder / "a.onnx", X),
}

NO_MODULES: list[tuple[Any, str]] = [
    ("resnet50", "model='resnet50' is a str: pass the module itself, such as timm.create_model("),
    (None, "model=None: pass a torch.nn.Module"),
    (nn.ReLU, "model=ReLU is a class: pass an instance of it, ReLU(...)"),
    (
        [nn.ReLU()],
        "model=[ReLU()] is a list: pass one module, such as torch.nn.Sequential(",
    ),
    (nn.Conv2d(3, 4, 3).state_dict(), "is an OrderedDict: is it a state_dict? Build the module"),
    ({}, "model={} is a dict: is it a state_dict?"),
    (X, "model=... is a Tensor: pass a torch.nn.Module"),
    (5, "model=5 is an int: pass a torch.nn.Module"),
    (lambda x: x, "model=... is a function: pass a torch.nn.Module"),
]


@pytest.mark.parametrize(("wrong", "message"), NO_MODULES, ids=lambda value: str(value)[:24])
@pytest.mark.parametrize("name", TAKES_A_MODULE)
def test_what_is_not_a_module_is_named(name: str, wrong: Any, message: str, given: Given) -> None:
    with pytest.raises(CoordConvPatchError, match=re.escape(message)):
        TAKES_A_MODULE[name](wrong, given)
    assert sorted(given.folder.iterdir()) == [given.coords]


def export(given: Given, **arguments: Any) -> Any:
    return ccp.export_onnx(given.patched, given.folder / "a.onnx", X, **arguments)


def verify(given: Given, **arguments: Any) -> Any:
    arguments = {"path": given.folder / "a.onnx", "example_inputs": X} | arguments
    return ccp.verify_onnx(model=given.patched, **arguments)


def in_turn(given: Given, places: Any) -> None:
    with ccp.places_in_turn(given.patched, places):
        given.patched(X)


def placed(given: Given, **options: Any) -> None:
    with ccp.places(given.patched, torch.zeros(2, 2, 3, **options)):
        given.patched(X)


class Fails:
    """As a selector: fails on every site."""

    __name__ = "fails"

    def __call__(self, site: Any) -> bool:
        raise AttributeError("no such field")


WRONG: list[tuple[Callable[[Given], Any], str]] = [
    # where and coords
    *(
        (lambda given, call=call, where=where: call(given.plain, where), message)  # type: ignore[misc]
        for call in (ccp.patch, ccp.patch_, ccp.plan)
        for where, message in (
            (3, "where=3 is an int: write 'first', 'all'"),
            (None, "where=None: write 'first'"),
            ([], "where=[] selects nothing"),
            ([0], "where=0 is an int: write"),
            ({}, "where={} is a dict: write"),
            (b"first", "where=b'first' is a bytes: write"),
            (nn.ReLU(), "where=... is a ReLU: write"),
            (int, "where=int matches no convolution"),
            (Fails(), "where=fails failed on the site '0': AttributeError: no such field"),
            ("", "where='' matches no convolution"),
        )
    ),
    *(
        (lambda given, call=call: call(given.plain, "first", coords=5), "coords=5: write a")  # type: ignore[misc]
        for call in (ccp.patch, ccp.patch_, ccp.plan)
    ),
    (lambda _: ccp.CoordConv2d(3, 4, 3, coords=5), "coords=5: write a Coordinates"),
    (lambda _: ccp.CoordConvPass(coords=[]), "coords=[]: write a Coordinates"),
    (lambda given: ccp.CoordConvPass(where=3)(torch.fx.symbolic_trace(given.plain)), "where=3 is"),
    (lambda given: ccp.CoordConvPass()(given.plain), "works on a GraphModule, not on Sequential"),
    # example inputs
    *(
        (lambda given, call=call, inputs=inputs: call(given, inputs), message)  # type: ignore[misc]
        for call in (
            lambda given, inputs: ccp.patch(given.plain, "first", example_inputs=inputs),
            lambda given, inputs: ccp.patch_(given.plain, "first", example_inputs=inputs),
            lambda given, inputs: ccp.plan(given.plain, "first", example_inputs=inputs),
            lambda given, inputs: ccp.import_coordconv_(given.plain, inputs),
            lambda given, inputs: ccp.export_onnx(given.patched, given.folder / "a.onnx", inputs),
            lambda given, inputs: verify(given, example_inputs=inputs),
        )
        for inputs, message in (
            (np.zeros((2, 3, 8, 8)), "example_inputs hold a NumPy array of shape (2, 3, 8, 8)"),
            ((np.zeros(1), {}), "torch.from_numpy(array)"),
            ((2, 3, 8, 8), "is it a shape? Pass a tensor, torch.zeros(2, 3, 8, 8)"),
            (torch.Size([2, 3]), "example_inputs=(2, 3): is it a shape?"),
            ("image.png", "example_inputs='image.png' is a str: pass a tensor, or a tuple"),
            (nn.ReLU(), "example_inputs=... is a ReLU: pass a tensor"),
            (7, "example_inputs=7 is an int: pass a tensor"),
        )
    ),
    (
        lambda given: ccp.export_onnx(given.patched, given.folder / "a.onnx", None),
        "example_inputs=None: pass a tensor, or a tuple of arguments",
    ),
    (lambda given: verify(given, example_inputs=None), "example_inputs=None: pass a tensor"),
    # paths
    *(
        (lambda given, call=call, path=path: call(given, path), "path=")  # type: ignore[misc]
        for call in (
            lambda given, path: ccp.save_coords(given.patched, path),
            lambda given, path: ccp.load_coords(given.plain, path),
            lambda given, path: ccp.load_coords_(given.plain, path),
            lambda given, path: ccp.export_onnx(given.patched, path, X),
            lambda given, path: verify(given, path=path),
        )
        for path in (None, 5, b"a.onnx", "", [], "a\0.onnx", "a\ud800.onnx")
    ),
    # numbers
    *(
        (lambda given, call=call, number=number: call(given, number), message)  # type: ignore[misc]
        for call, name in (
            (lambda given, lr: ccp.param_groups(given.patched, lr=lr), "lr"),
            (lambda given, lr: ccp.param_groups(given.patched, coord_lr=lr), "coord_lr"),
            (lambda given, lr: ccp.param_groups(given.patched, weight_decay=lr), "weight_decay"),
            (
                lambda given, lr: ccp.param_groups(given.patched, coord_weight_decay=lr),
                "coord_weight_decay",
            ),
            (lambda given, lr: ccp.add_to_optimizer_(given.optimizer, given.patched, lr=lr), "lr"),
            (lambda given, number: export(given, tolerance=number), "tolerance"),
            (lambda given, number: verify(given, tolerance=number), "tolerance"),
        )
        for number, message in (
            ("x", f"{name}='x' is a str: write a finite number, 0 or more"),
            (float("nan"), f"{name}=nan is a float: write a finite number"),
            (float("inf"), f"{name}=inf is a float: write a finite number"),
            (-1.0, f"{name}=-1.0 is a float: write a finite number"),
            (True, f"{name}=True is a bool: write a finite number"),
            ([1e-3], f"{name}=[0.001] is a list: write a finite number"),
        )
    ),
    (lambda given: export(given, tolerance=None), "tolerance=None: write a finite number"),
    # operator sets, names, flags
    *(
        (lambda given, opset=opset: export(given, opset=opset), f"opset={opset!r}")  # type: ignore[misc]
        for opset in (0, 6, -1, 99, True, "17", 17.0, [17], float("nan"))
    ),
    (lambda given: export(given, opset=24, exporter="torchscript"), "opset=24: write a whole numb"),
    (lambda given: export(given, exporter="onnx"), "exporter='onnx': write 'auto', 'dynamo' or"),
    (lambda given: export(given, exporter=None), "exporter=None: write 'auto'"),
    (lambda given: export(given, exporter=[]), "exporter=[]: write 'auto'"),
    (lambda given: export(given, lowering="maps"), "lowering='maps': write 'auto'"),
    (lambda given: export(given, lowering=None), "lowering=None: write 'auto'"),
    (lambda given: export(given, providers="CPUExecutionProvider"), "['CPUExecutionProvider']"),
    (lambda given: export(given, providers=5), "providers=5 is an int: write a list of names"),
    (lambda given: export(given, providers=[]), "providers=[]"),
    (lambda given: verify(given, providers="CUDA"), "providers='CUDA' is a str: write a list"),
    (lambda given: export(given, input_names="x"), "input_names='x' is a str: write a list of"),
    (lambda given: export(given, output_names=[1]), "output_names=[1] is a list: write a list"),
    (lambda given: export(given, disabled_optimizers="Pad"), "disabled_optimizers='Pad' is a str"),
    (lambda given: verify(given, disabled_optimizers=3), "disabled_optimizers=3 is an int"),
    (lambda given: export(given, dynamic_batch="no"), "dynamic_batch='no' is a str: write True or"),
    (lambda given: export(given, dynamic_size=1), "dynamic_size=1 is an int: write True or False"),
    (lambda given: ccp.import_coordconv(given.plain, X, check=1), "check=1 is an int: write True"),
    (lambda given: ccp.unpatch(given.patched, discard="no"), "discard='no' is a str: write True"),
    (lambda given: ccp.unpatch_(given.patched, discard=None), "discard=None: write True or False"),
    (
        lambda given: ccp.load_coords(given.plain, given.coords, check_base="no"),
        "check_base='no' is a str: write True or False",
    ),
    (lambda given: ccp.patch(given.plain, check="no"), "check='no' is a str: write True or False"),
    (lambda given: ccp.patch_(given.plain, check=1), "check=1 is an int: write True or False"),
    (
        lambda given: ccp.save_coords(
            given.patched, given.folder / "b.safetensors", include_batch_norm="no"
        ),
        "include_batch_norm='no' is a str: write True or False",
    ),
    (lambda _: ccp.scrambled(seed=None), "seed=None: write the seed of a permutation"),
    # what is one of a kind, but not of the right one
    (lambda _: ccp.Coordinates().grid(3), "size=3: write one length a dimension"),
    (lambda _: ccp.Coordinates().grid(None), "size=None: write one length a dimension"),
    (lambda _: ccp.Coordinates().grid(torch.tensor(3)), "size=tensor(3): write one length"),
    (lambda _: ccp.Coordinates().grid((3, 3), dtype="float"), "dtype='float': coordinates are"),
    (lambda _: ccp.Coordinates().grid((3, 3), dtype=torch.int8), "dtype=torch.int8: coordinates"),
    (lambda _: ccp.Coordinates().grid((3, 3), device="zz"), "device='zz': RuntimeError: "),
    (lambda _: ccp.Coordinates().grid((3, 3), device=[]), "device=[]: TypeError: "),
    (lambda given: in_turn(given, torch.tensor(1)), "places=tensor(1): write a list of places"),
    (lambda given: placed(given, device="meta"), "0 has places on the meta device"),
    (lambda given: ccp.tile_predictor(given.patched, b"xy"), "image_size=b'xy': give images"),
    (lambda given: ccp.tile_predictor(given.patched, "88"), "image_size='88': give images"),
    *(
        (lambda given, call=call: call(given, torch.zeros(2)), message)  # type: ignore[misc]
        for call, message in (
            (
                lambda given, side: ccp.load_concatenated(given.patched, {}, coordinates=side),
                "coordinates=... is a Tensor: write 'last' or 'first'",
            ),
            (lambda given, name: export(given, exporter=name), "exporter=tensor([0., 0.]): write"),
            (lambda given, name: export(given, lowering=name), "lowering=tensor([0., 0.]): write"),
        )
    ),
    # the rest
    (lambda given: ccp.set_window_(given.patched, 5), "window=5: write a Window(...) or None"),
    (lambda given: ccp.set_window_(given.patched, (0, 8)), "window=(0, 8): write a Window"),
    (lambda given: ccp.add_to_optimizer_("adam", given.patched), "optimizer='adam' is a str"),
    (
        lambda given: ccp.add_to_optimizer_(given.patched, given.optimizer),
        "optimizer=... is a Sequential: pass the optimizer first, then the model",
    ),
    (lambda _: ccp.from_exported("model.pt2"), "program='model.pt2' is a str: from_exported takes"),
    (lambda given: ccp.from_exported(given.plain), "program=... is a Sequential: from_exported"),
    (lambda _: ccp.from_exported(None), "program=None: from_exported takes a program"),
    (lambda given: ccp.fold_with(given.patched, "fuse"), "function='fuse' is a str: pass a functi"),
    (lambda given: ccp.fold_with(given.patched, None), "function=None: pass a function"),
    (lambda given: ccp.fold_with(given.patched, nn.Conv2d), "function=Conv2d is a class: pass a f"),
]


@pytest.mark.parametrize(
    ("call", "message"),
    WRONG,
    ids=[f"{index} {message[:40]}" for index, (_, message) in enumerate(WRONG)],
)
def test_a_wrong_argument_is_named_and_nothing_is_changed(
    call: Callable[[Given], Any], message: str, given: Given
) -> None:
    before = {name: described(getattr(given, name)) for name in ("plain", "patched")}
    groups = len(given.optimizer.param_groups)
    with pytest.raises(CoordConvPatchError, match=re.escape(message)):
        call(given)
    for name, description in before.items():
        assert described(getattr(given, name)) == description
    assert len(given.optimizer.param_groups) == groups
    assert sorted(given.folder.iterdir()) == [given.coords]


def described(model: nn.Module) -> list[Any]:
    """Classes, flags, settings and weights of a model, to compare."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    tensors = [(name, tensor.tolist()) for name, tensor in model.state_dict().items()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    windows = [getattr(module, "coords", None) for module in model.modules()]
    return [modules, tensors, flags, windows]


@pytest.mark.parametrize("number", [0, 0.5, np.float32(0.25), torch.tensor(0.5)])
def test_numbers_of_every_kind_are_rates(number: Any, given: Given) -> None:
    groups = ccp.param_groups(given.patched, lr=number, coord_lr=number)
    assert [group["lr"] for group in groups] == [number, number]


def test_example_inputs_may_be_whatever_a_model_is_called_with() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, batch: Any, scale: float = 1.0) -> Tensor:
            image = batch["image"] if isinstance(batch, dict) else batch[0]
            return self.conv(image) * scale

    for inputs in ({"image": X}, [X], ([X],), ([X], 2.0), ([X], {"scale": 2.0})):
        plan = ccp.plan(Takes(), "first", example_inputs=inputs)
        assert [site.name for site in plan.chosen] == ["conv"]


@pytest.mark.parametrize("compile_", [torch.jit.script, lambda net: torch.jit.trace(net, X)])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, _: ccp.fold(model),
        lambda model, _: ccp.fold(model, X),
        lambda model, folder: ccp.export_onnx(model, folder / "a.onnx", X),
        lambda model, folder: ccp.export_onnx(model, folder / "a.onnx", X, exporter="torchscript"),
    ],
    ids=["fold", "bake", "export", "export by TorchScript"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_models_of_torchscript_are_refused_by_name(
    call: Callable[[nn.Module, Path], Any], compile_: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    model = compile_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    with pytest.raises(CoordConvPatchError, match="the model is a TorchScript module"):
        call(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Unreadable:
    """Fails to be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("cannot be shown")


class UnreadableList(list[Any]):
    def __iter__(self) -> Any:
        raise RuntimeError("cannot be read")

    __repr__ = Unreadable.__repr__
    __len__ = __iter__


@pytest.mark.parametrize(
    "value",
    [Unreadable(), [Unreadable()], {1: Unreadable()}, UnreadableList(), 10**5000, "x" * 10**6],
    ids=["object", "list", "dict", "odd list", "number", "text"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda given, value: ccp.Coordinates(order=value),
        lambda given, value: ccp.Radius(normalized=value),
        lambda given, value: ccp.unpatch(given.patched, discard=value),
        lambda given, value: ccp.save_coords(given.patched, [value]),
        lambda given, value: register_lowering(value),
        lambda given, value: register_target(value),
        lambda given, value: export(given, exporter=value),
        lambda given, value: export(given, lowering=value),
        lambda given, value: ccp.plot_coords(
            given.patched, given.folder / "a.png", X, sites=[value]
        ),
        lambda given, value: ccp.patch(given.plain, [value]),
    ],
    ids=[
        *("order", "normalized", "flag", "path", "lowering", "target", "exporter", "form"),
        *("sites", "where"),
    ],
)
def test_values_of_any_kind_have_short_messages(
    call: Callable[[Given, Any], Any], value: Any, given: Given
) -> None:
    with pytest.raises(CoordConvPatchError) as caught:
        call(given, value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("start", ["", "re:", "layer1.", "[", "first,"])
def test_long_selectors_have_short_messages(start: str, given: Given) -> None:
    for call in (ccp.patch, ccp.plan):
        with pytest.raises(CoordConvPatchError) as caught:
            call(given.plain, start + "x" * 10**5)
        message = str(caught.value)
        assert len(message) < 1000
        assert "where=" in message[:10]
        assert "matches no convolution" in message
