"""fold(model, example_inputs): what it saves needs torch alone, for one image size."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models import resnet18

import coordconv_patch as ccp
from coordconv_patch.errors import ExampleInputsError, PatchError

PLAIN_PROCESS = """
import sys
sys.modules["coordconv_patch"] = None  # importing it raises an ImportError
import torch
load = {
    "pickle": lambda path: torch.load(path, weights_only=False),
    "program": lambda path: torch.export.load(path).module(),
    "trace": torch.jit.load,
    "script": torch.jit.load,
    "aoti": lambda path: __import__("torch._inductor")._inductor.aoti_load_package(path),
}
images, expected = torch.load("tensors.pt")
for kind in sys.argv[1:]:
    model = load[kind](f"{kind}.pt2")
    for batch in (1, 2):
        torch.testing.assert_close(model(images[:batch]), expected[:batch], rtol=1e-5, atol=1e-5)
    print(kind)
"""


def network() -> nn.Module:
    """Strides, groups, a circular border, a batch norm and a transposed convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 5, stride=2, padding=(2, 1), bias=False),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
        nn.Conv2d(6, 4, (1, 3), padding="same", dilation=2),
    )


def patched(model: nn.Module, std: float = 0.1) -> nn.Module:
    model = ccp.patch(model.eval(), "all")
    torch.manual_seed(0)
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=std)
    return model


def as_pickle(model: nn.Module, images: Tensor, path: Path) -> None:
    torch.save(model, path)


def program(model: nn.Module, images: Tensor) -> Any:
    sizes = ({0: Dim("batch", min=1, max=64)},)
    return torch.export.export(model, (images,), dynamic_shapes=sizes)


def as_program(model: nn.Module, images: Tensor, path: Path) -> None:
    torch.export.save(program(model, images), path)


def as_trace(model: nn.Module, images: Tensor, path: Path) -> None:
    trace: Any = torch.jit.trace
    trace(model, images).save(str(path))


def as_script(model: nn.Module, images: Tensor, path: Path) -> None:
    script: Any = torch.jit.script
    script(model).save(str(path))


def as_aoti(model: nn.Module, images: Tensor, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(program(model, images), package_path=str(path))


SAVE: dict[str, Callable[[nn.Module, Tensor, Path], None]] = {
    "pickle": as_pickle,
    "program": as_program,
    "trace": as_trace,
    "script": as_script,
    "aoti": as_aoti,
}


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(["pickle", "program", "trace", "script"], id="files"),
        # A compiler's minute.
        pytest.param(["aoti"], id="AOTInductor", marks=pytest.mark.docs),
    ],
)
@torch.no_grad()
def test_files_load_where_the_package_is_not_installed(kinds: list[str], tmp_path: Path) -> None:
    model, images = patched(network()), torch.rand(2, 3, 16, 14)
    expected = model(images)
    assert (expected - ccp.unpatch(model, discard=True)(images)).abs().max() > 0.1
    torch.save((images, expected), tmp_path / "tensors.pt")
    folded = ccp.fold(model, images)
    for kind in kinds:
        SAVE[kind](folded, images, tmp_path / f"{kind}.pt2")
    command = [sys.executable, "-c", PLAIN_PROCESS, *kinds]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.stdout.split() == kinds, run.stderr


@pytest.mark.parametrize("std", [0.0, 0.1])
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (network, (16, 14)),
        (lambda: nn.Conv2d(3, 4, 3, stride=2), (9, 8)),
        (lambda: nn.Conv1d(3, 4, 3), (9,)),
        (lambda: nn.Conv3d(3, 4, 2, padding=1, padding_mode="reflect"), (5, 4, 6)),
        (lambda: timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=3), (32, 32)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), (9, 8)),
        (lambda: resnet18(num_classes=3), (40, 32)),
    ],
)
@torch.no_grad()
def test_outputs_are_those_of_the_patched_model(
    make: Callable[[], nn.Module], size: tuple[int, ...], std: float
) -> None:
    model, images = patched(make(), std), torch.rand(2, 3, *size)
    folded = ccp.fold(model, images[:1])
    assert not any(".coord_weight" in f".{name}" for name in folded.state_dict())
    for each in (folded, copy.deepcopy(folded)):
        torch.testing.assert_close(each(images), model(images), rtol=1e-4, atol=1e-5)


def test_weights_keep_their_names_and_maps_stand_for_coordinate_weights() -> None:
    model = patched(network())
    folded = ccp.fold(model, torch.rand(1, 3, 16, 16))
    names = {name.replace("coord_weight", "coord_map") for name in ccp.fold(model).state_dict()}
    assert folded.state_dict().keys() == names
    other = ccp.fold(patched(network()), torch.rand(1, 3, 16, 16))
    folded.load_state_dict(other.state_dict())


def test_a_program_computes_no_coordinates() -> None:
    images = torch.rand(2, 3, 16, 16)
    nodes = program(ccp.fold(patched(network()), images), images).graph.nodes
    convolutions = [node for node in nodes if "conv" in str(node.target)]
    assert len(convolutions) == 4
    assert not any("arange" in str(node.target) for node in nodes)


def test_another_size_is_refused_even_where_broadcasting_would_stretch_the_map() -> None:
    folded = ccp.fold(patched(nn.Conv2d(3, 4, 5)), torch.rand(1, 3, 5, 5))
    with pytest.raises(AssertionError, match="folded for inputs of 5 x 5: fold the model for"):
        folded(torch.rand(1, 3, 9, 9))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 3, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.head(input))


class Unused(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input


def test_what_cannot_be_baked_is_refused_by_name() -> None:
    images = torch.rand(1, 3, 9, 9)
    with pytest.raises(
        PatchError, match=r"head runs at several sizes .*7 x 7 and 9 x 9.*fold with"
    ):
        ccp.fold(ccp.patch(Twice(), ["head"]), images)
    with pytest.raises(
        PatchError, match="only some calls of head have coordinates: call fold with"
    ):
        ccp.fold(ccp.patch(Twice(), ["head@0"], example_inputs=images), images)
    with pytest.raises(PatchError, match="0 did not run on the example inputs"):
        ccp.fold(ccp.patch(Unused(nn.Conv2d(3, 3, 3)), ["0"]), images)
    with pytest.raises(ExampleInputsError, match="failed on the example inputs"):
        ccp.fold(patched(network()), torch.rand(1, 4, 9, 9))
