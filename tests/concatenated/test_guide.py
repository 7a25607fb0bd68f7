"""What docs/coming_from_coordconv.md says, run in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import coordconv_patch as ccp

PAGE = Path(__file__).parents[2] / "docs" / "coming_from_coordconv.md"


def test_the_code_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    parts = text.split("```python\n")[1:]
    blocks = [part.split("```")[0] for part in parts]
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out.splitlines()
    shown = parts[0].split("```\n")[2].splitlines()
    # All but the roundings, which differ between machines.
    assert [line.split("(deviates")[0] for line in printed[:2]] == [
        line.split("(deviates")[0] for line in shown[:2]
    ]
    assert names["report"].worst_difference < 1e-6
    assert isinstance(names["model"][0], ccp.CoordConv2d)
    assert torch.equal(names["plain"][0].conv.weight, names["checkpoint"]["0.weight"])
    assert isinstance(torch.load("plain.pt", weights_only=False)[0], nn.Sequential)
