"""Programs of torch.export: patched, fine-tuned, saved and loaded where their source is gone."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
import torch.nn.functional as F
from concat_model import concatenating
from old_torch import IS_2_6, STRICT
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.sites.find import find_sites


class Net(nn.Module):
    """Every kind of convolution, batch norm, dropout, an alias, a keyword and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.same = timm.layers.Conv2dSame(4, 4, 3, stride=2)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1)
        self.standardised = timm.layers.ScaledStdConv2d(4, 4, 3)
        self.register_buffer("offset", torch.ones(1), persistent=False)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        x = self.drop(self.norm(self.stem(x)).relu())
        x = self.shared(self.shared(self.same(x)))
        return self.standardised(self.up(x)) * scale + self.offset


SITES = ["stem", "same", "shared", "up", "standardised"]
KEYWORDS = {"scale": torch.tensor(2.0)}


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 16, 20)


def fill_coords_(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.normal_(std=0.3, generator=generator)
    return model


def patched_net() -> nn.Module:
    torch.manual_seed(0)
    return fill_coords_(ccp.patch(Net(), "all", coords=ccp.Coordinates(radius=True)))


def exported(model: nn.Module, x: Tensor, *, strict: bool = False) -> ExportedProgram:
    batch = Dim("batch", min=1, max=64)
    return torch.export.export(
        model, (x,), KEYWORDS, strict=strict, dynamic_shapes={"x": {0: batch}, "scale": None}
    )


def saved_and_loaded(program: ExportedProgram, path: Path) -> ExportedProgram:
    torch.export.save(program, path)
    return torch.export.load(path)


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return copy.deepcopy(model)(x, **KEYWORDS)


# --- the coordinates of a program are layers again ------------------------------------------------


@pytest.mark.parametrize("strict", STRICT)
@pytest.mark.parametrize("training", [False, True])
def test_exported_coordinates_are_layers_again(
    strict: bool, training: bool, x: Tensor, tmp_path: Path
) -> None:
    model = patched_net().train(training)
    program = saved_and_loaded(exported(model, x, strict=strict), tmp_path / "p.pt2")
    found = ccp.from_exported(program)
    layers = coord_layers(found)
    assert sorted(layers) == sorted(SITES)
    for name, layer in coord_layers(model).items():
        assert layers[name].coords == layer.coords == ccp.Coordinates(radius=True)
        assert torch.equal(layers[name].coord_weight, layer.coord_weight)
    assert found.training is training
    for mode in (True, False):
        model.train(mode)
        found.train(mode)
        assert torch.equal(seeded(found, x), seeded(model, x))
    assert torch.equal(found.eval()(x[:1], **KEYWORDS), model.eval()(x[:1], **KEYWORDS))


def test_sites_of_a_patched_program_have_their_modules_names(x: Tensor) -> None:
    sites = find_sites(ccp.from_exported(exported(patched_net(), x))).sites
    assert [(site.name, site.patched, site.obstacle) for site in sites] == [
        (name, True, "") for name in SITES
    ]


def test_loaded_program_keeps_names_of_the_state_and_constants_out(x: Tensor) -> None:
    model = Net()
    program = exported(model, x)
    found = ccp.from_exported(program)
    assert set(found.state_dict()) == set(model.state_dict()) == set(program.state_dict)
    assert set(copy.deepcopy(found).state_dict()) == set(model.state_dict())
    found.load_state_dict(model.state_dict())


def test_program_and_model_made_of_it_share_no_weights(x: Tensor) -> None:
    program = exported(patched_net(), x)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    found = ccp.from_exported(program)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(1)
    assert all(torch.equal(program.state_dict[name], value) for name, value in before.items())


@pytest.mark.parametrize("training", [False, True])
def test_unpatched_program_computes_what_the_plain_model_does(training: bool, x: Tensor) -> None:
    model = patched_net().train(training)
    program = exported(model, x)
    with pytest.raises(PatchError, match="coordinate weights are not zero at"):
        ccp.unpatch(program)
    plain = ccp.unpatch(program, discard=True)
    assert torch.equal(seeded(plain, x), seeded(ccp.unpatch(model, discard=True), x))
    assert "coord" not in str(plain.graph)
    assert not [node for node in plain.graph.nodes if "arange" in str(node.target)]


def test_weights_go_from_a_program_to_its_source_and_back(x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Net().eval()
    model = fill_coords_(ccp.patch(plain, "all"))
    ccp.save_coords(model, tmp_path / "module.safetensors")
    found = ccp.from_exported(exported(model, x))
    ccp.save_coords(found, tmp_path / "program.safetensors")
    expected = model(x, **KEYWORDS)
    again = ccp.load_coords(plain, tmp_path / "program.safetensors", check_base=False)
    assert torch.equal(again(x, **KEYWORDS), expected)
    ccp.train_only_coords_(found)
    with torch.no_grad():
        for weight in ccp.coord_parameters(found):
            weight.zero_()
    ccp.load_coords_(found, tmp_path / "module.safetensors", check_base=False)
    assert torch.equal(found(x, **KEYWORDS), expected)


def test_window_reaches_a_program(x: Tensor) -> None:
    model = patched_net().eval()
    found = ccp.from_exported(exported(model, x))
    window = ccp.Window((2, 3), (16, 20), (40, 50))
    for each in (model, found):
        ccp.set_window_(each, window)
    assert torch.equal(found(x, **KEYWORDS), model(x, **KEYWORDS))
    exported_again = ccp.from_exported(exported(found, x))
    assert torch.equal(exported_again(x, **KEYWORDS), model(x, **KEYWORDS))
    assert {layer.coords.window for layer in coord_layers(exported_again).values()} == {window}


def test_second_export_is_no_larger_than_the_first(x: Tensor) -> None:
    first = exported(patched_net().eval(), x)
    second = exported(ccp.from_exported(first), x)
    assert len(second.graph.nodes) <= len(first.graph.nodes)


def test_program_that_is_patched_further_keeps_what_it_has(x: Tensor) -> None:
    torch.manual_seed(0)
    model = fill_coords_(ccp.patch(Net().eval(), "stem"))
    patched = ccp.patch(exported(model, x), ["shared", "up"])
    assert sorted(coord_layers(patched)) == ["shared", "stem", "up"]
    assert torch.equal(patched(x, **KEYWORDS), model(x, **KEYWORDS))
    with pytest.raises(ccp.errors.SelectionError, match="already patched: stem"):
        ccp.patch(exported(model, x), "stem")


def test_decomposed_program_of_the_default_padding(x: Tensor) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", dilation=2),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        timm.layers.Conv2dSame(4, 4, 3, stride=2),
    )
    for training in (True, False):
        model = fill_coords_(ccp.patch(plain.train(training), "all"))
        program = torch.export.export(model, (x,)).run_decompositions()
        found = ccp.from_exported(program)
        assert sorted(coord_layers(found)) == ["0", "3"]
        for mode in (training, False):  # an evaluation program has lost its dropout for good
            torch.manual_seed(3)
            expected = copy.deepcopy(model).train(mode)(x)
            torch.manual_seed(3)
            torch.testing.assert_close(copy.deepcopy(found).train(mode)(x), expected)


def test_branch_that_cannot_be_read_is_refused_by_name(x: Tensor) -> None:
    program = exported(patched_net(), x).run_decompositions()  # takes circular padding to pieces
    with pytest.raises(
        PatchError,
        match=r"coordinates of stem\.coord_weight cannot be made a layer again: .*changed",
    ):
        ccp.from_exported(program)


def test_program_without_a_convention_is_refused(x: Tensor) -> None:
    program = torch.export.export(ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3)), "all"), (x,))
    for node in program.graph.nodes:
        node.meta.pop("custom", None)
    with pytest.raises(PatchError, match="does not tell the convention"):
        ccp.from_exported(program)


def test_strict_export_keeps_the_convention_or_the_remedy_is_named(x: Tensor) -> None:
    patched = ccp.patch(nn.Conv2d(3, 4, 3), "all")
    program = torch.export.export(patched, (x,), strict=True)
    if not hasattr(torch.fx.traceback, "annotate"):  # before torch 2.10
        with pytest.raises(PatchError, match=r"strict export of torch 2\..* pass strict=False"):
            ccp.from_exported(program)
        return
    assert len(coord_layers(ccp.from_exported(program))) == 1


def test_module_of_a_patched_program_names_the_remedy(x: Tensor) -> None:
    module = exported(patched_net(), x).module()
    with pytest.raises(PatchError, match=re.escape("use from_exported(program)")):
        ccp.unpatch(module)
    assert sorted(coord_layers(ccp.from_exported(module))) == sorted(SITES)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(PatchError, match="is a Net: from_exported takes a program"):
        ccp.from_exported(Net())


def test_half_precision_program(x: Tensor) -> None:
    model = fill_coords_(ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).bfloat16(), "all"))
    image = x.bfloat16()
    found = ccp.from_exported(torch.export.export(model, (image,)))
    assert torch.equal(found(image), model(image))
    assert ccp.coord_parameters(found)[0].dtype is torch.bfloat16


# --- modes ----------------------------------------------------------------------------------------


def test_frozen_batch_norm_stays_frozen_until_the_mode_is_set(x: Tensor) -> None:
    model = Net().train()
    model.norm.eval()
    found = ccp.from_exported(exported(model, x))
    assert found.training
    assert not found.norm.training
    assert torch.equal(seeded(found, x), seeded(model, x))


def test_flags_that_are_set_directly_reach_the_program(x: Tensor) -> None:
    model = patched_net().train()
    found = ccp.from_exported(exported(model, x))
    for part in found.modules():
        part.training = False
    assert torch.equal(seeded(found, x), seeded(model.eval(), x))


def test_statistics_and_counters_move_in_training_alone(x: Tensor) -> None:
    model = Net().train()
    found = ccp.from_exported(exported(copy.deepcopy(model), x))
    for _ in range(2):
        torch.manual_seed(1)
        model(x, **KEYWORDS)
        torch.manual_seed(1)
        found(x, **KEYWORDS)
    found.eval()(x, **KEYWORDS)
    assert found.norm.num_batches_tracked == model.norm.num_batches_tracked == 2
    assert torch.equal(found.norm.running_mean, model.norm.running_mean)


def test_evaluation_program_is_trained_with_batch_norm_and_dropout_alive(x: Tensor) -> None:
    """Step by step what the patched source would have become."""
    torch.manual_seed(0)
    source = Net().eval()
    program = exported(source, x)
    results = []
    for model in (ccp.patch(source, "all"), ccp.patch(program, "all")):
        model.train()
        optimizer = torch.optim.SGD(ccp.param_groups(model, lr=1e-2, coord_lr=1e-1))
        torch.manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad()
            model(x, **KEYWORDS).square().mean().backward()
            optimizer.step()
        assert all(bool(weight.any()) for weight in ccp.coord_parameters(model))
        results.append(model.eval()(x, **KEYWORDS))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_program_in_training_mode_is_exported_in_evaluation_mode(x: Tensor, tmp_path: Path) -> None:
    model = patched_net().train()
    found = ccp.from_exported(exported(model, x))
    if IS_2_6:  # a batch norm that no convolution takes in, and a keyword for the other exporter
        with pytest.raises(ccp.ExportError, match=r"exporter of torch 2\.6.* fewer operators"):
            ccp.export_onnx(found, tmp_path / "p.onnx", (x, KEYWORDS))
        return
    ccp.export_onnx(found, tmp_path / "p.onnx", (x, KEYWORDS))
    session = ort.InferenceSession(tmp_path / "p.onnx", providers=["CPUExecutionProvider"])
    feeds = {"x": x.numpy(), "scale": KEYWORDS["scale"].numpy()}
    (output,) = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    expected = model.eval()(x, **KEYWORDS).detach().numpy()
    assert np.abs(output - expected).max() < 1e-5 * np.abs(expected).max()
    assert found.training


# --- kinds of programs ----------------------------------------------------------------------------


class Signals(nn.Module):
    """Convolutions of signals and volumes, several inputs in nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.signal = nn.Conv1d(2, 4, 3, stride=2, groups=2)
        self.back = nn.ConvTranspose1d(4, 4, 4, stride=2, padding=1, groups=2)
        self.volume = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))
        self.up = nn.ConvTranspose3d(2, 2, 2, stride=2)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3))

    def forward(self, pair: tuple[Tensor, Tensor], *, gain: dict[str, Tensor]) -> dict[str, Tensor]:
        signal = F.conv1d(self.back(self.signal(pair[0])), self.kernel)
        return {"signal": signal * gain["signal"], "volume": self.up(self.volume(pair[1]))}


def test_signals_and_volumes_in_nested_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Signals()
    pair = (torch.randn(2, 2, 11), torch.randn(2, 1, 3, 5, 6))
    gain = {"signal": torch.tensor(0.5)}
    program = torch.export.export(model, (pair,), {"gain": gain})
    patched = ccp.patch(program, "all", example_inputs=(pair, {"gain": gain}))
    assert sorted(coord_layers(patched)) == ["back", "kernel", "signal", "up", "volume"]
    for name, value in model(pair, gain=gain).items():
        assert torch.equal(patched(pair, gain=gain)[name], value)
    fill_coords_(patched)
    again = ccp.from_exported(
        saved_and_loaded(torch.export.export(patched, (pair,), {"gain": gain}), tmp_path / "s.pt2")
    )
    for name, value in patched(pair, gain=gain).items():
        assert torch.equal(again(pair, gain=gain)[name], value)
        assert not torch.equal(value, model(pair, gain=gain)[name])


def test_patched_program_equals_concatenation(x: Tensor) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, (3, 2), stride=2, dilation=(1, 2), groups=2),
    ).eval()
    patched = fill_coords_(ccp.patch(source, "all"))
    program = ccp.patch(torch.export.export(source, (x,)).run_decompositions(), "all")
    with torch.no_grad():
        for to, weight in zip(
            ccp.coord_parameters(program), ccp.coord_parameters(patched), strict=True
        ):
            to.copy_(weight)
        again = ccp.from_exported(torch.export.export(program, (x,)))
        expected = concatenating(patched)(x)
        torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-5)


def test_only_chosen_calls_of_a_program(x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Net().eval()
    model = fill_coords_(ccp.patch(source, "shared@1", example_inputs=(x, KEYWORDS)))
    patched = ccp.patch(exported(source, x), "shared@1", example_inputs=(x, KEYWORDS))
    fill_coords_(patched)
    expected = model(x, **KEYWORDS)
    assert torch.equal(patched(x, **KEYWORDS), expected)
    again = ccp.from_exported(exported(patched, x))
    assert torch.equal(again(x, **KEYWORDS), expected)
    assert coord_layers(again)["shared"].chosen_calls.indices == (1,)
    ccp.save_coords(again, tmp_path / "c.safetensors")
    loaded = ccp.load_coords(source, tmp_path / "c.safetensors", check_base=False)
    assert torch.equal(loaded(x, **KEYWORDS), expected)
    plain = ccp.unpatch(again, discard=True)
    assert torch.equal(plain(x, **KEYWORDS), source(x, **KEYWORDS))


def test_dynamic_image_size(x: Tensor, tmp_path: Path) -> None:
    model = fill_coords_(ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), "all"))
    sizes = {0: Dim("n", min=1), 2: Dim("h", min=4, max=64), 3: Dim("w", min=4, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,))
    found = ccp.from_exported(saved_and_loaded(program, tmp_path / "d.pt2"))
    for shape in ((2, 3, 16, 20), (1, 3, 9, 33)):
        image = torch.randn(shape)
        torch.testing.assert_close(found(image), model(image))


@pytest.mark.parametrize("decomposed", [False, True])
def test_padding_of_a_convolutions_own_leaves_its_coordinates_alone(
    decomposed: bool, x: Tensor
) -> None:
    """A program's coordinates are those of the module: of the image, not of the padded one."""
    torch.manual_seed(0)
    source = nn.Sequential(
        timm.layers.Conv2dSame(3, 4, 3, stride=2),
        nn.ZeroPad2d((1, 0, 2, 3)),  # a layer of the model, which makes another image
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, (2, 4), padding="same", padding_mode="replicate"),
    ).eval()
    sites = ["0", "2"] if decomposed else "all"  # replicating is taken to pieces
    model = fill_coords_(ccp.patch(source, sites))
    program = torch.export.export(source, (x,))
    found = ccp.patch(program.run_decompositions() if decomposed else program, sites)
    fill_coords_(found)
    torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found(x), source(x), atol=1e-2)
    inputs = [site.calls[0].input_size for site in find_sites(program.module(), x).sites]
    assert inputs[:2] == [(16, 20), (13, 11)]


def test_padding_that_depends_on_the_image_size_is_an_obstacle(x: Tensor) -> None:
    class Squared(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (0, x.shape[2] // 4, 0, x.shape[2] // 4)))

    program = torch.export.export(
        nn.Sequential(Squared(3, 4, 3), nn.Conv2d(4, 4, 1)),
        (x,),
        dynamic_shapes=({2: Dim("height", min=8, max=64)},),
    )
    with pytest.warns(UserWarning, match="0: it pads by amounts that are computed at run time"):
        assert list(coord_layers(ccp.patch(program, "all"))) == ["1"]


# --- where the source is gone ---------------------------------------------------------------------

TUNE = """
import json, sys
import torch
import coordconv_patch as ccp
from coordconv_patch.cli.main import main

sys.argv = "coordconv-patch patch plain.pt2 --trust --where all --out patched.pt2".split()
try:
    main()
except SystemExit as stop:
    assert not stop.code
program = torch.export.load("patched.pt2")
model = ccp.from_exported(program)
(x,), _ = program.example_inputs
model.train()
optimizer = torch.optim.SGD(ccp.param_groups(model, lr=1e-2, coord_lr=1e-1))
losses = []
for _ in range(5):
    optimizer.zero_grad()
    loss = (model(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
model.eval()
batch = torch.export.Dim("batch", min=1, max=32)
tuned = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
torch.export.save(tuned, "tuned.pt2")
torch.save({"x": x[:1], "y": model(x[:1]).detach()}, "expected.pt")
print(json.dumps({"losses": losses, "modules": list(sys.modules)}))
"""

USE = """
import json, sys
import torch
import coordconv_patch as ccp
from coordconv_patch.cli.main import main

model = ccp.from_exported(torch.export.load("tuned.pt2"))
wanted = torch.load("expected.pt")
report = ccp.export_onnx(model, "tuned.onnx", wanted["x"])
ccp.save_coords(model, "tuned.safetensors")
plain = ccp.unpatch(model, discard=True)
print(json.dumps({
    "equal": torch.equal(model(wanted["x"]), wanted["y"]),
    "weights": [float(weight.detach().abs().max()) for weight in ccp.coord_parameters(model)],
    "difference": report.checks[0].difference,
    "plain_differs": not torch.equal(plain(wanted["x"]), wanted["y"]),
    "lowerings": report.lowerings,
}))
for command in (
    "plan tuned.pt2 --trust --json",
    "export tuned.pt2 --trust --out cli.onnx",
    "verify tuned.pt2 --trust cli.onnx",
    "patch tuned.pt2 --trust --out cli.safetensors",
    "patch plain.pt2 --trust --coord-weights cli.safetensors --out never.pt2",
):
    sys.argv = ["coordconv-patch", *command.split()]
    print("command", command, flush=True)
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


class Source(nn.Module):
    """What the processes below know nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.1)
        self.head = nn.Conv2d(4, 2, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.stem(x)).relu()))


def ran(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python process in a folder, isolated from this one's paths."""
    apart = "import sys; del sys.path[0]\n"  # what -P does from Python 3.11 on
    return subprocess.run(
        [sys.executable, "-c", apart + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_whole_way_without_the_source(tmp_path: Path) -> None:
    """Patched by the command line, fine-tuned, saved; loaded and exported by another process."""
    torch.manual_seed(0)
    source, batch = Source().eval(), Dim("batch", min=1, max=32)
    images = torch.rand(2, 3, 8, 12)
    program = torch.export.export(source, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "plain.pt2")

    tuning = ran(tmp_path, TUNE)
    assert tuning.returncode == 0, tuning.stderr
    said, _, values = tuning.stdout.strip().rpartition("\n")
    assert "bit-equal" in said
    tuned = json.loads(values)
    assert tuned["losses"][-1] < tuned["losses"][0]
    assert not [name for name in tuned["modules"] if name.startswith("test_")]

    using = ran(tmp_path, USE)
    first, *commands = using.stdout.split("command ")
    used = json.loads(first)
    assert used["equal"]
    assert used["plain_differs"]
    assert all(weight > 1e-3 for weight in used["weights"])
    assert used["difference"] < 1e-5
    assert list(used["lowerings"]) == ["stem", "head"]
    _check_commands(tmp_path, commands)
    # Its base weights were trained too, so the last command has to refuse the plain program.
    assert (using.returncode, "belongs to a model with other weights" in using.stderr) == (2, True)
    assert not (tmp_path / "never.pt2").exists()


def _check_commands(folder: Path, said: list[str]) -> None:
    """The commands take the tuned program as it is, and what they write is right."""
    sites = json.loads(said[0].partition("\n")[2])["sites"]
    assert [(site["name"], site["reason"]) for site in sites] == [
        ("stem", "already patched"),
        ("head", "already patched"),
    ]
    assert "agrees with torch" in said[2]
    wanted = torch.load(folder / "expected.pt")
    session = ort.InferenceSession(folder / "cli.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": wanted["x"].numpy()})
    np.testing.assert_allclose(output, wanted["y"].numpy(), rtol=1e-4, atol=1e-5)
    model = ccp.from_exported(torch.export.load(folder / "tuned.pt2"))
    with torch.no_grad():
        for weight in ccp.coord_parameters(model):
            weight.zero_()
    ccp.load_coords_(model, folder / "cli.safetensors")
    assert torch.equal(model(wanted["x"]), wanted["y"])


@pytest.mark.parametrize(
    "use",
    [
        ccp.coord_parameters,
        lambda program: ccp.save_coords(program, "never.safetensors"),
        lambda program: ccp.export_onnx(program, "never.onnx", torch.zeros(1, 3, 8, 8)),
        ccp.fold,
    ],
)
def test_a_program_where_a_module_is_wanted_names_from_exported(use: Any) -> None:
    program = torch.export.export(nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),))
    with pytest.raises(PatchError, match=r"from_exported\(program\) makes a module of it"):
        use(program)
    assert not Path("never.onnx").exists()


def test_coordinates_of_a_programs_own_module_are_asked_for_by_from_exported() -> None:
    model = ccp.patch(nn.Conv2d(3, 4, 3), "all")
    program = torch.export.export(model, (torch.zeros(1, 3, 8, 8),))
    with pytest.raises(PatchError, match=r"in place of program.module\(\)"):
        ccp.coord_parameters(program.module())
