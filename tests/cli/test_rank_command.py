"""``coordconv-patch rank``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import coordconv_patch as ccp
from coordconv_patch.cli.commands import app
from coordconv_patch.errors import PatchError

CODE = """
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.entry, self.exit = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, images):
        return self.exit(self.entry(images).relu()).mean((2, 3))


def task():
    torch.manual_seed(0)
    batches = [torch.rand(4, 1, 6, 6) for _ in range(8)]
    return Net(), batches, loss


def loss(model, batch):
    return F.mse_loss(model(batch)[:, 0], batch.mean((1, 2, 3)))


def two():
    return Net(), []


def fails():
    return Net(), [torch.rand(4, 1, 6, 6) for _ in range(8)], lambda model, batch: 1 / 0
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "task.py"
    path.write_text(CODE)
    return str(path)


def test_it_prints_the_table_and_draws(source: str, tmp_path: Path) -> None:
    picture = tmp_path / "ranking.svg"
    options = ["--steps", "2", "--where", "exit", "--picture", str(picture)]
    ran = CliRunner().invoke(app, ["rank", f"{source}:task", *options], catch_exceptions=False)
    assert "2 runs of 2 steps of each" in ran.stdout
    assert "entry" not in ran.stdout
    assert "exit" in picture.read_text()


def test_it_prints_json(source: str) -> None:
    options = ["--steps", "2", "--by", "stage", "--json"]
    ran = CliRunner().invoke(app, ["rank", f"{source}:task", *options], catch_exceptions=False)
    rows = json.loads(ran.stdout)["rows"]
    assert {row["name"] for row in rows} == {"entry", "exit"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{}:two", "it must return three things"),
        ("{}:none", "has no function 'none'"),
        ("timm:resnet18", "write path/to/file.py:FUNCTION"),
    ],
)
def test_what_cannot_be_ranked_is_told(source: str, given: str, message: str) -> None:
    with pytest.raises(ccp.ModelSourceError, match=message):
        CliRunner().invoke(app, ["rank", given.format(source)], catch_exceptions=False)


def test_a_loss_that_fails_is_told(source: str) -> None:
    ran = CliRunner().invoke(app, ["rank", f"{source}:fails", "--steps", "2"])
    assert isinstance(ran.exception, PatchError)
    assert re.search(r"loss_fn failed .*ZeroDivisionError", str(ran.exception))
