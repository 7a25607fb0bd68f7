"""What type checkers know: a patched model has the type of the model. mypy checks this file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from typing_extensions import assert_type

import coordconv_patch as ccp


class Net(nn.Module):
    """A model with a method of its own, which a checker has to find on the patched one too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def channels(self) -> int:
        return self.conv.out_channels


def test_a_patched_model_has_the_type_of_the_model(tmp_path: Path) -> None:
    patched = ccp.patch(Net())
    assert_type(patched, Net)
    assert patched.channels() == 4
    assert_type(ccp.patch_(Net()), Net)
    assert_type(ccp.unpatch(patched), Net)
    ccp.save_coords(patched, tmp_path / "c.safetensors")
    assert_type(ccp.load_coords(patched, tmp_path / "c.safetensors"), Net)
    assert_type(ccp.load_coords_(patched, tmp_path / "c.safetensors"), Net)
    assert_type(ccp.unpatch_(patched), Net)


def test_an_exported_program_becomes_a_graph_module() -> None:
    program = torch.export.export(Net(), (torch.rand(2, 3, 8, 8),))
    assert_type(program, ExportedProgram)
    patched = ccp.patch(program)
    assert_type(patched, fx.GraphModule)
    assert isinstance(patched, fx.GraphModule)
