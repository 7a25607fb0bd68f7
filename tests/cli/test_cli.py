"""The command line: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from concat_model import concatenating
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import coordconv_patch as ccp
from coordconv_patch.cli import commands as cli
from coordconv_patch.cli import models, options
from coordconv_patch.cli.commands import app
from coordconv_patch.cli.main import main
from coordconv_patch.errors import CoordConvPatchError
from coordconv_patch.export import onnx as export
from coordconv_patch.export.targets import TARGETS
from coordconv_patch.layers.coord_layer import coord_layers

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.entry = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.exit = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.exit(self.body(self.entry(x)))


def make():
    torch.manual_seed(0)
    return Net(), torch.rand(2, 3, 8, 12)


def undefined():
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float("nan"))
    return net


def number():
    return 3


def raises():
    raise KeyError("missing thing")


class Detector(Net):
    def forward(self, images):
        return [{"map": super(Detector, self).forward(image[None])} for image in images]


def detector():
    torch.manual_seed(0)
    return Detector(), ([torch.rand(3, 8, 12)],)
"""


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both streams, with line breaks and the table's lines taken out."""
        return re.sub(r"[\s\u2500-\u257f]+", " ", self.out + " " + self.err)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Ran]:
    """The command as a user gives it; an exception that would be a traceback fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "zoo_of_test.py").write_text(CODE)

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["coordconv-patch", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture(autouse=True)
def _modules_restored() -> Iterator[None]:
    yield
    sys.modules.pop("zoo_of_test", None)


NET = "zoo_of_test.py:make"


def network() -> nn.Module:
    """The network of the file above, for comparison."""
    namespace: dict[str, Any] = {"__name__": "zoo_of_test"}
    exec(CODE, namespace)
    model, _ = namespace["make"]()
    return model.eval()


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, 8, 12, generator=torch.Generator().manual_seed(5))


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ccp.coord_parameters(model):
            parameter.normal_(generator=generator)
    return model


def onnx_output(path: str, x: Tensor) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


# --- plan ---------------------------------------------------------------------------------------


def test_plan_shows_every_site_and_marks_the_chosen(run: Callable[..., Ran]) -> None:
    ran = run("plan", NET, "--sites")
    assert ran.code == 0
    for part in ("+ entry", "  body.2", "  exit", "matches 'first'", "8×12"):
        assert part in ran.out
    assert "1 of 3 sites chosen, 72 coordinate weights" in ran.text


def test_plan_shows_a_row_for_each_stage(run: Callable[..., Ran]) -> None:
    ran = run("plan", "timm:resnet18", "--input", "1,3,32,32")
    assert "+ conv1" in ran.out
    assert "  layer4.*" in ran.out
    assert "layer4.0.conv1" not in ran.out


def test_plan_writes_a_page(run: Callable[..., Ran], tmp_path: Path) -> None:
    assert run("plan", NET, "--html", str(tmp_path / "plan.html")).code == 0
    assert "body.2" in (tmp_path / "plan.html").read_text(encoding="utf-8")


def test_plan_can_show_the_chosen_sites_alone(run: Callable[..., Ran]) -> None:
    ran = run("plan", NET, "--chosen", "--where", "exit")
    assert "exit" in ran.text
    assert "entry" not in ran.text
    assert "1 of 3 sites chosen" in ran.text


def test_where_may_be_repeated_and_takes_globs_and_regexes(run: Callable[..., Ran]) -> None:
    def chosen(*arguments: str) -> list[str]:
        sites = json.loads(run("plan", NET, "--json", *arguments).out)["sites"]
        return [site["name"] for site in sites if site["chosen"]]

    assert chosen("--where", "entry", "-w", "exit") == ["entry", "exit"]
    assert chosen("--where", "body.*") == ["body.2"]
    assert chosen("--where", "re:e.*") == ["entry", "exit"]
    assert chosen("--where", "all") == ["entry", "body.2", "exit"]
    assert chosen() == ["entry"]


def test_plan_as_json_is_json_alone(run: Callable[..., Ran]) -> None:
    ran = run("plan", NET, "--json", "--where", "all", "--radius")
    parsed = json.loads(ran.out)
    assert parsed["coords"] == {"radius": True}
    entry = parsed["sites"][0]
    assert entry["parameters"] == 4 * 3 * 9
    assert entry["calls"] == [[[8, 12], [8, 12]]]
    assert entry["geometry"]["kernel_size"] == [3, 3]


def test_input_sets_the_example_size(run: Callable[..., Ran]) -> None:
    parsed = json.loads(run("plan", NET, "--json", "--input", "1x3x20x30").out)
    assert parsed["sites"][0]["calls"] == [[[20, 30], [20, 30]]]


def test_coords_takes_the_presets(run: Callable[..., Ran]) -> None:
    parsed = json.loads(run("plan", NET, "--json", "--coords", "mkocabas").out)
    assert ccp.Coordinates.from_dict(parsed["coords"]) == ccp.Coordinates.preset("mkocabas")


def test_plan_reads_a_zoo_model(run: Callable[..., Ran]) -> None:
    ran = run("plan", "timm:resnet18", "--input", "1,3,32,32", "--chosen")
    assert ran.code == 0
    assert "conv1" in ran.text
    assert "1 of 20 sites chosen" in ran.text


# --- patch --------------------------------------------------------------------------------------


def test_patch_writes_zero_coordinate_weights_for_load_coords(run: Callable[..., Ran]) -> None:
    ran = run("patch", NET, "--out", "c.safetensors", "--where", "all")
    assert ran.code == 0
    assert "patched 3 convolutions; 1 outputs (384 numbers) are bit-equal" in ran.text
    assert "wrote c.safetensors" in ran.text
    assert not any(tensor.any() for tensor in load_file("c.safetensors").values())
    loaded = ccp.load_coords(network(), "c.safetensors")
    assert list(coord_layers(loaded)) == ["entry", "body.2", "exit"]


def test_patch_writes_a_program_that_is_a_source_again(run: Callable[..., Ran]) -> None:
    assert run("patch", NET, "--out", "c.pt2").code == 0
    program = torch.export.load("c.pt2")
    assert "entry.coord_weight" in program.state_dict
    x = torch.rand(2, 3, 8, 12)
    torch.testing.assert_close(program.module()(x), network()(x))
    assert run("plan", "c.pt2", "--trust", "--where", "exit").code == 0
    assert sorted(path.name for path in Path().glob("*.pt2")) == ["c.pt2"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "c.pt2"),
        ("patch", "c.pt2", "--out", "d.safetensors"),
        ("export", "c.pt2", "--out", "d.onnx"),
        ("verify", "c.pt2", "c.onnx"),
        ("bench", "c.pt2"),
    ],
)
def test_a_program_that_is_not_trusted_is_refused_with_the_reason(
    arguments: tuple[str, ...], run: Callable[..., Ran]
) -> None:
    Path("c.pt2").write_bytes(b"anything")
    Path("c.onnx").write_bytes(b"anything")
    ran = run(*arguments)
    assert ran.code == 2
    assert "c.pt2 is not loaded: " in ran.text
    assert "runs any code that its maker put into it" in ran.text
    assert "pass --trust" in ran.text


def test_a_patched_program_does_not_offer_its_coordinates_as_convolutions(
    run: Callable[..., Ran],
) -> None:
    run("patch", NET, "--out", "c.pt2")
    sites = json.loads(run("plan", "c.pt2", "--trust", "--json", "--where", "exit").out)["sites"]
    assert [site["name"] for site in sites] == ["entry", "body.2", "exit"]


def test_patch_that_changes_outputs_is_an_error_and_writes_nothing(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = models.patch
    monkeypatch.setattr(models, "patch", lambda *args, **kwargs: filled(real(*args, **kwargs)))
    ran = run("patch", NET, "--out", "c.safetensors")
    assert ran.code == 1
    assert "outputs are not those of the plain model" in ran.text
    assert not Path("c.safetensors").exists()


# --- checkpoints --------------------------------------------------------------------------------


def other_weights() -> nn.Module:
    model = network()
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("form", ["safetensors", "pth", "nested and prefixed"])
def test_a_checkpoint_gives_the_weights_of_the_export(form: str, run: Callable[..., Ran]) -> None:
    model = other_weights()
    state = model.state_dict()
    name = "w.safetensors" if form == "safetensors" else "w.pth"
    if form == "safetensors":
        save_file(state, name)
    elif form == "pth":
        torch.save(state, name)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1}, name)
    ran = run("export", NET, "--out", "n.onnx", "--checkpoint", name, "--exporter", "torchscript")
    assert ran.code == 0
    expected = model(images(3)).detach().numpy()
    np.testing.assert_allclose(onnx_output("n.onnx", images(3)), expected, atol=1e-4)


def test_a_checkpoint_of_the_patched_model_brings_its_coordinates(run: Callable[..., Ran]) -> None:
    model = filled(ccp.patch(network(), "all"))
    torch.save(model.state_dict(), "w.pth")
    options = ("--where", "all", "--checkpoint", "w.pth", "--exporter", "torchscript")
    assert run("export", NET, "--out", "n.onnx", *options).code == 0
    expected = concatenating(model)(images(3)).detach().numpy()
    np.testing.assert_allclose(onnx_output("n.onnx", images(3)), expected, atol=1e-4)


class Custom:
    """An object in a checkpoint."""


@pytest.mark.parametrize("kind", ["garbage", "objects", "another model", "missing"])
@pytest.mark.parametrize("command", ["patch", "export"])
def test_a_bad_checkpoint_is_named_and_nothing_is_written(
    command: str, kind: str, run: Callable[..., Ran]
) -> None:
    if kind == "garbage":
        Path("w.pth").write_bytes(b"garbage")
    elif kind == "objects":
        torch.save({"model": network().state_dict(), "extra": Custom()}, "w.pth")
    elif kind == "another model":
        torch.save(nn.Linear(2, 2).state_dict(), "w.pth")
    out = {"patch": "c.safetensors", "export": "n.onnx"}[command]
    ran = run(command, NET, "--out", out, "--checkpoint", "w.pth")
    assert ran.code == 2
    assert "error:" in ran.err
    assert "w.pth" in ran.text
    assert not Path(out).exists()


# --- export and verify --------------------------------------------------------------------------


@pytest.fixture
def weights(run: Callable[..., Ran]) -> nn.Module:
    """A fine-tuned model, whose coordinate weights lie in c.safetensors."""
    model = filled(ccp.patch(network(), ["entry", "exit"]))
    ccp.save_coords(model, "c.safetensors")
    return model


def test_export_with_coordinate_weights_then_verify(
    weights: nn.Module, run: Callable[..., Ran]
) -> None:
    options = ("--coord-weights", "c.safetensors", "--provider", "CPUExecutionProvider")
    ran = run("export", NET, "--out", "n.onnx", *options, "--lowering", "map", "--opset", 18)
    assert ran.code == 0
    for part in ("2 as map", "dynamo", "opset 18", "CPUExecutionProvider", "x: batch", "n.onnx"):
        assert part in ran.text
    expected = concatenating(weights)(images(4)).detach().numpy()
    np.testing.assert_allclose(onnx_output("n.onnx", images(4)), expected, atol=1e-4)

    agreed = run("verify", NET, "n.onnx", *options)
    assert agreed.code == 0
    assert "n.onnx agrees with torch on" in agreed.text
    assert "(CPUExecutionProvider)" in agreed.text

    plain = run("verify", NET, "n.onnx")
    assert plain.code == 1
    assert re.search(r"error: .* differ on .* by \d", plain.text)
    assert run("verify", NET, "n.onnx", "--tolerance", "1000").code == 0


def test_export_of_any_size(run: Callable[..., Ran]) -> None:
    options = ("--dynamic-size", "--exporter", "torchscript", "--where", "all")
    ran = run("export", NET, "--out", "n.onnx", *options)
    assert ran.code == 0
    assert "3 as computed" in ran.text
    x = torch.rand(1, 3, 9, 30)
    np.testing.assert_allclose(onnx_output("n.onnx", x), network()(x).detach().numpy(), atol=1e-4)


def test_export_of_a_fixed_batch(run: Callable[..., Ran]) -> None:
    ran = run("export", NET, "--out", "n.onnx", "--static-batch", "--exporter", "torchscript")
    assert ran.code == 0
    assert "dynamic axes none" in ran.text
    with pytest.raises(Exception, match=r"(?i)invalid"):
        onnx_output("n.onnx", images(3))


def test_an_old_operator_set_is_obeyed(run: Callable[..., Ran]) -> None:
    ran = run("export", NET, "--out", "n.onnx", "--opset", 11)
    assert ran.code == 0
    assert "opset 11" in ran.text
    assert onnx.load("n.onnx").opset_import[0].version == 11


@pytest.mark.parametrize("opset", [0, 6, 99])
def test_an_impossible_operator_set_is_refused_before_the_model_is_loaded(
    opset: int, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*arguments: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(cli, "loaded_model", loads)
    ran = run("export", NET, "--out", "n.onnx", "--opset", opset)
    assert ran.code == 2
    assert f"--opset {opset}: write a whole number from 7 to" in ran.text


def test_a_detector_is_exported_with_a_fixed_number_of_images(run: Callable[..., Ran]) -> None:
    options = ("--exporter", "torchscript", "--where", "all")
    assert run("export", "zoo_of_test.py:detector", "--out", "n.onnx", *options).code == 0
    x = images(1)
    np.testing.assert_allclose(
        onnx_output("n.onnx", x[0]), network()(x).detach().numpy(), atol=1e-4
    )


def test_random_weights_of_a_zoo_model_are_pointed_out(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export_onnx", lambda *args, **kwargs: _Report())
    ran = run("export", "timm:resnet10t", "--out", "n.onnx", "--input", "1,3,32,32")
    assert ran.code == 0
    assert "the weights are random; pass --pretrained or --checkpoint" in ran.text
    assert "random" not in run("export", NET, "--out", "n.onnx").text


class _Report:
    def table(self) -> str:
        return "a report"


# --- bench --------------------------------------------------------------------------------------


def test_bench_prints_markdown_of_every_form_batch_and_thread_number(
    run: Callable[..., Ran],
) -> None:
    options = [
        *("--lowering", "auto", "--lowering", "map"),
        "--repeats",
        "2",
        "--batch",
        "1",
        "--batch",
        "3",
        "--threads",
        "1",
        "--where",
        "all",
        "--provider",
    ]
    ran = run("bench", NET, *options, "CPUExecutionProvider", "--picture", "b.png")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == f"### coordconv-patch bench: {NET}, 3 patched sites"
    command = f"coordconv-patch bench {NET} {' '.join(options)} CPUExecutionProvider"
    assert f"- command: `{command} --picture b.png`" in lines
    for batch in (1, 3):
        assert f"**CPUExecutionProvider, batch {batch}, 1 thread**" in lines
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows.count("naive concat") == rows.count("plain again") == 2
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")


def test_bench_prints_json_alone(run: Callable[..., Ran]) -> None:
    ran = run("bench", NET, "--repeats", 2, "--json", "--lowering", "map")
    found = json.loads(ran.out)
    assert found["model"] == NET
    assert found["command"].endswith("--json --lowering map")
    assert list(found["groups"][0]["variants"]) == ["plain", "plain again", "map", "naive concat"]


def test_bench_refuses_a_batch_that_a_program_does_not_take(run: Callable[..., Ran]) -> None:
    program = torch.export.export(network(), (images(2),))
    torch.export.save(program, "n.pt2")
    ran = run("bench", "n.pt2", "--trust", "--batch", 2, "--batch", 3, "--repeats", 1)
    assert ran.code == 2
    assert "--batch 3: the program was exported for batches of 2 alone" in ran.text


# --- a user's mistakes --------------------------------------------------------------------------

MISTAKES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no such form": (("plan", "resnet50"), 2, r"path/to/file\.py:FUNCTION or model\.pt2"),
    "unknown model": (("plan", "timm:resnet55"), 2, "close names: .*resnet5"),
    "missing file": (("plan", "nothing.py:make"), 2, r"there is no file nothing\.py"),
    "missing function": (("plan", "zoo_of_test.py:mak"), 2, "no function 'mak'; close names: make"),
    "no module": (("plan", "zoo_of_test.py:number"), 2, "returned a int; it must return"),
    "function raises": (("plan", "zoo_of_test.py:raises"), 2, "KeyError: 'missing thing'"),
    "missing program": (("plan", "nothing.pt2"), 2, r"there is no file nothing\.pt2"),
    "no numbers": (("plan", NET, "--input", "3x"), 2, "write numbers like 1,3,224,224"),
    "wrong shape": (("plan", NET, "--input", "1,5,8,8"), 2, r"failed on .*\(1, 5, 8, 8\).*--input"),
    "no batch": (("plan", "timm:resnet10t", "--input", "3,64,64"), 2, "batch first, such as 1,3,"),
    "several sites in one": (
        ("plan", NET, "--where", "first,body.2"),
        2,
        "for several selectors write --where first --where body.2",
    ),
    "no such site": (("plan", NET, "--where", "entri"), 2, "matches no .*close names: entry"),
    "no such preset": (("plan", NET, "--coords", "polar"), 2, "no coordinate preset 'polar'"),
    "wrong ending": (("patch", NET, "--out", "c.pth"), 2, r"ends in \.safetensors or \.pt2"),
    "no folder": (("patch", NET, "--out", "no/c.safetensors"), 2, "the folder no does not exist"),
    "no folder, program": (("patch", NET, "--out", "no/c.pt2"), 2, "folder no does not exist"),
    "a folder": (("patch", NET, "--out", "folder.safetensors"), 2, "folder"),
    "a pipe": (("patch", NET, "--out", "pipe.safetensors"), 2, "a named pipe, not a regular file"),
    "a pipe, program": (("patch", NET, "--out", "pipe.pt2"), 2, "a named pipe, not a regular"),
    "a pipe, graph": (("export", NET, "--out", "pipe.onnx"), 2, "a named pipe, not a regular"),
    "a folder, program": (("patch", NET, "--out", "folder.pt2"), 2, "folder"),
    "a folder, export": (("export", NET, "--out", "folder.onnx"), 2, "folder"),
    "export ending": (("export", NET, "--out", "n.bin"), 2, r"ends in \.onnx"),
    "export folder": (("export", NET, "--out", "no/n.onnx"), 2, "the folder no does not exist"),
    "lowering": (("export", NET, "--out", "n.onnx", "--lowering", "fold"), 2, "write 'auto'"),
    "exporter": (("export", NET, "--out", "n.onnx", "--exporter", "x"), 2, "exporter 'x': write"),
    "opset": (("export", NET, "--out", "n.onnx", "--opset", "3"), 2, "--opset 3: write a whole"),
    "size of a form": (
        ("export", NET, "--out", "n.onnx", "--dynamic-size", "--lowering", "map"),
        2,
        "--lowering 'map' stores coordinates of one size, but --dynamic-size: write --lowering",
    ),
    "provider": (("export", NET, "--out", "n.onnx", "--provider", "X"), 2, "has no X; it has"),
    "both": (
        ("export", NET, "--out", "n.onnx", "--where", "all", "--coord-weights", "c.safetensors"),
        2,
        "exclude each other",
    ),
    "no weights": (
        ("export", NET, "--out", "n.onnx", "--coord-weights", "none.safetensors"),
        2,
        r"there is no file none\.safetensors",
    ),
    "weights of no kind": (
        ("verify", NET, "garbage.onnx", "--coord-weights", "garbage.onnx"),
        2,
        "is not a safetensors file",
    ),
    "other base": (
        ("export", "timm:resnet10t", "--out", "n.onnx", "--coord-weights", "c.safetensors"),
        2,
        "which this model does not have",
    ),
    "shape with weights": (
        (
            "export",
            NET,
            "--out",
            "n.onnx",
            "--coord-weights",
            "c.safetensors",
            "--input",
            "1,5,8,8",
        ),
        2,
        r"\(\d, 5, 8, 8\)",
    ),
    "nothing to verify": (("verify", NET, "none.onnx"), 2, r"there is no file none\.onnx"),
    "garbage to verify": (("verify", NET, "garbage.onnx"), 1, r"garbage\.onnx"),
    "unknown command": (("patsch",), 2, "No such command"),
    "unknown option": (("plan", NET, "--wehre", "all"), 2, "No such option"),
    "no model": (("plan",), 2, "Missing argument"),
    "batch of none": (
        ("bench", NET, "--batch", "0"),
        2,
        "(greater than or equal to 1|not in the range)",
    ),
    "picture ending": (("bench", NET, "--picture", "b.gif"), 2, r"ends in \.png, \.svg or \.pdf"),
    "picture folder": (("bench", NET, "--picture", "no/b.png"), 2, "the folder no does not exist"),
    "bench lowering": (("bench", NET, "--lowering", "fold"), 2, "write auto, .*channels"),
    "bench provider": (("bench", NET, "--provider", "X"), 2, "has no X; it has"),
}


NAMES = {*inspect.signature(ccp.export_onnx).parameters, "where", "coords", "check"}
PYTHONS = re.compile(rf"\b({'|'.join(NAMES)})=")
"""Arguments as Python's functions have them."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_message_and_an_exit_code(mistake: str, run: Callable[..., Ran]) -> None:
    Path("garbage.onnx").write_bytes(b"not a graph" * 50)
    for suffix in ("safetensors", "pt2", "onnx"):
        Path(f"folder.{suffix}").mkdir()
        os.mkfifo(f"pipe.{suffix}")
    if "c.safetensors" in MISTAKES[mistake][0]:
        ccp.save_coords(ccp.patch(network(), "entry"), "c.safetensors")
    before = sorted(path.name for path in Path().iterdir())
    arguments, code, message = MISTAKES[mistake]
    ran = run(*arguments)
    assert re.search(message, ran.text), ran.text
    assert ran.code == code
    assert ran.err.strip()
    assert not PYTHONS.search(ran.err), "an argument that only Python has"
    left = {path.name for path in Path().iterdir()} - {"__pycache__"}
    assert sorted(left) == before


@pytest.mark.parametrize("command", ["patch", "export", "verify"])
def test_pretrained_without_a_network_says_so(
    command: str, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(timm, "create_model", unreachable)
    Path("n.onnx").write_bytes(b"")
    out = ("n.onnx",) if command == "verify" else ("--out", f"n.{OUTPUT[command]}")
    ran = run(command, "timm:resnet18", *out, "--pretrained")
    assert ran.code == 2
    assert "the pretrained weights of resnet18 cannot be had (URLError" in ran.text
    assert "Is there a network? If you have the weights in a file" in ran.text


OUTPUT = {"patch": "safetensors", "export": "onnx"}


def test_markup_in_a_message_is_shown_as_it_is(run: Callable[..., Ran]) -> None:
    ran = run("plan", NET, "--where", "[bold]x[/bold]")
    assert ran.code == 2
    assert "--where '[bold]x[/bold]'" in ran.text


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "patch", "export", "verify", "bench", "env", "demo"])
def test_the_help_of_each_command_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    assert f"Example: coordconv-patch {command}" in result.output


def test_the_help_of_export_names_every_lowering() -> None:
    result = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "300"})
    assert "auto, autotune, channels, map, branch, separable, computed" in result.output


def test_the_root_help_names_the_commands_and_the_exit_codes() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    for word in ("plan", "patch", "export", "verify", "bench", "demo", "Exit codes", "timm:"):
        assert word in result.output


def test_the_examples_of_the_help_parse() -> None:
    """Every option in an example exists: the command line gets as far as its model."""
    for command, example in {
        "plan": "plan none: --where layer1.*.conv2",
        "patch": "patch none: --pretrained --out coords.safetensors",
        "export": "export none: --pretrained --out r50.onnx",
        "bench": "bench none: --where all --batch 1 --batch 4",
    }.items():
        result = CliRunner().invoke(app, example.split())
        assert isinstance(result.exception, CoordConvPatchError), (command, result.output)
        assert "write timm:NAME" in str(result.exception)


def test_the_environment_tells_what_an_issue_needs(run: Callable[..., Ran]) -> None:
    ran = run("env")
    machine, providers, versions = ran.out.splitlines()
    assert ran.code == 0
    assert machine.startswith("- machine: ")
    assert f"{platform.system()} {platform.machine()}" in machine
    assert providers.endswith("CPUExecutionProvider")
    assert f"torch {metadata.version('torch')}" in versions


@pytest.mark.parametrize("command", ["", "plan", "patch", "export", "verify", "bench", "demo"])
def test_help_has_a_short_form_and_nothing_of_it_is_eaten_as_markup(command: str) -> None:
    arguments = [command] if command else []
    short, long = (
        CliRunner().invoke(app, [*arguments, flag], env={"COLUMNS": "200"}).output
        for flag in ("-h", "--help")
    )
    assert short == long
    if command == "bench":
        assert "Default: 1." in short
        assert "Default: all." in short


def test_a_file_of_random_weights_is_noted_by_patch(run: Callable[..., Ran]) -> None:
    arguments = ("patch", "timm:resnet10t", "--input", "1,3,32,32", "--out", "c.safetensors")
    ran = run(*arguments)
    assert ran.code == 0
    assert "the weights are random, drawn anew by each command, so the file fits no" in ran.text
    assert "note" not in run("patch", NET, "--out", "d.safetensors").text
    quiet = run(*arguments, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert "wrote" in run("patch", NET, "--out", "d.safetensors").out  # quiet no longer


def test_quiet_tells_errors_and_what_was_asked_for(run: Callable[..., Ran]) -> None:
    assert "no .*close names" not in run("plan", NET, "--where", "entri", "-q").err
    assert "matches no convolution" in run("plan", NET, "--where", "entri", "-q").err
    assert json.loads(run("plan", NET, "--json", "--quiet").out)["parameters"] == 72


def test_verbose_tells_what_is_done(run: Callable[..., Ran]) -> None:
    export = ("export", NET, "--out", "n.onnx")
    assert "patched entry" in run(*export, "-v").err
    assert run(*export).err == ""


@pytest.mark.filterwarnings("default::UserWarning")
def test_warnings_are_notes_without_the_line_that_warns(run: Callable[..., Ran]) -> None:
    with open("zoo_of_test.py", "a") as file:
        file.write(SHARED)
    ran = run("patch", "zoo_of_test.py:unused", "--where", "spare", "--out", "c.safetensors")
    assert "note: chosen convolutions never run on the example inputs: spare" in ran.text
    assert "warnings.warn" not in ran.err
    assert ".py" not in ran.err


SHARED = """

class Unused(Net):
    def __init__(self):
        super().__init__()
        self.spare = nn.Conv2d(3, 3, 1)


def unused():
    return Unused(), torch.rand(2, 3, 8, 12)
"""


def test_the_version_is_the_packages(run: Callable[..., Ran]) -> None:
    ran = run("--version")
    assert (ran.code, ran.out) == (0, f"{ccp.__version__}\n")


# --- as a process -------------------------------------------------------------------------------


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coordconv_patch.cli.main", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_process_that_succeeds_exits_with_0_and_pipes_json(tmp_path: Path) -> None:
    (tmp_path / "zoo_of_test.py").write_text(CODE)
    ran = process("plan", NET, "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["parameters"] == 72


def test_a_process_with_a_wrong_input_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    ran = process("plan", "nothing.py:make", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert "there is no file nothing.py" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_process_whose_outputs_differ_exits_with_1_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "zoo_of_test.py").write_text(CODE)
    model = network()
    with torch.no_grad():
        model.exit.weight.mul_(2)
    torch.onnx.export(model, (images(2),), str(tmp_path / "n.onnx"), dynamo=False, opset_version=17)
    ran = process("verify", NET, "n.onnx", cwd=tmp_path)
    assert ran.returncode == 1
    assert "differ" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_export_s_help_names_every_target() -> None:
    help_of_target = get_args(options.TargetName)[1].help
    assert help_of_target.split(": ")[1].rstrip(".").split(", ") == list(TARGETS)


# --- where nothing can be printed ----------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--version"], ""), (["plan", NET], "1"), (["plan", NET, "--json"], "")],
    ids=["version", "plan", "json"],
)
def test_a_full_output_is_an_error(
    arguments: list[str], unbuffered: str, run: Callable[..., Ran], tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        ran = _process(arguments, tmp_path, stdout=full, unbuffered=unbuffered)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: standard output cannot be written: OSError: [Errno 28]")
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors of the POSIX kind")
def test_a_closed_output_is_an_error(run: Callable[..., Ran], tmp_path: Path) -> None:
    ran = _process(["plan", NET], tmp_path, before=lambda: os.close(1))
    assert (ran.returncode, ran.stderr) == (2, "error: standard output is closed\n")


def _process(
    arguments: list[str],
    folder: Path,
    *,
    stdout: Any = None,
    unbuffered: str = "",
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(Path(ccp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, "-m", "coordconv_patch.cli.main", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": unbuffered, "COLUMNS": "300"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
        check=False,
    )


def test_outputs_that_are_not_numbers_are_equal_too(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = run("patch", "zoo_of_test.py:undefined", "--out", tmp_path / "a.safetensors")
    assert ran.code == 0
    assert "are bit-equal, but" in ran.out
    assert "not numbers (NaN), before as after" in ran.out
