"""What docs/places.md shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from diffusers import AutoencoderKL
from monai.inferers import sliding_window_inference
from torch import nn
from torch.utils.data import DataLoader

import coordconv_patch as ccp

PAGE = Path(__file__).parents[2] / "docs" / "places.md"


def blocks(section: str) -> str:
    text = PAGE.read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert code, section
    return code


def names() -> dict[str, Any]:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=32,
    )
    return {
        **{"ccp": ccp, "torch": torch, "torchvision": torchvision, "DataLoader": DataLoader},
        "sliding_window_inference": sliding_window_inference,
        "model": ccp.patch(nn.Conv2d(3, 4, 3, padding=1).eval()),
        "vae": ccp.patch(vae.eval(), "decoder.conv_in"),
        "images": torch.rand(2, 3, 80, 100),
        "latents": torch.randn(1, 4, 24, 28),
        "picture": torch.rand(3, 96, 128),
        "array": np.zeros((96, 128, 3), np.uint8),
        "mask": np.zeros((96, 128), np.uint8),
    }


@pytest.mark.parametrize(
    ("section", "name", "shape"),
    [
        ("Data pipelines", "outputs", (4, 4, 64, 64)),
        ("Tiles by MONAI", "outputs", (2, 4, 80, 100)),
        ("Tiles by code that says nothing", "pictures", (1, 3, 48, 56)),
        ("Flips at test time", "outputs", (2, 4, 80, 100)),
    ],
)
def test_the_page_runs(section: str, name: str, shape: tuple[int, ...]) -> None:
    values = names()
    exec(blocks(section), values)
    assert values[name].shape == shape
    if section == "Data pipelines":
        assert values["thetas"].shape == (4, 2, 3)
        assert values["result"]["theta"].shape == (2, 3)


@pytest.mark.parametrize("thing", [ccp.PlacedTransform, ccp.places_in_turn])
def test_the_examples_of_docstrings_run(thing: Any) -> None:
    import doctest

    values = {"torch": torch, "coordconv_patch": ccp, "PlacedTransform": ccp.PlacedTransform}
    values["model"] = ccp.patch(nn.Conv2d(3, 4, 3, padding=1))
    (example,) = doctest.DocTestFinder(recurse=False).find(thing, "example", globs=values)
    assert example.examples
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert results.failed == 0
