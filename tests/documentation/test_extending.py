"""What docs/extending.md says, done from outside of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import coordconv_patch as ccp
from coordconv_patch.channels.registry import BLOCKS
from coordconv_patch.lowering.constants import CoordConstant
from coordconv_patch.lowering.sums import Sum

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


pytestmark = pytest.mark.usefixtures("registries")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def test_a_selector_that_sees_all_sites() -> None:
    ccp.register_selector("last", lambda site_map: [site_map.sites[-1]])
    patched = ccp.patch(model(), where="last")
    assert [status.name for status in ccp.layer_status(patched)] == ["2"]
    with pytest.raises(ccp.ArgumentError, match="has a selector of this name"):
        ccp.register_selector("last", lambda site_map: [])
    with pytest.raises(ccp.ArgumentError, match="write a word"):
        ccp.register_selector("a*", lambda site_map: [])
    with pytest.raises(ccp.ArgumentError, match="choose="):
        ccp.register_selector("other", None)  # type: ignore[arg-type]


def test_a_selector_that_means_nothing_here_says_so() -> None:
    ccp.register_selector("nowhere", lambda site_map: [])
    with pytest.raises(ccp.SelectionError, match="where='nowhere' matches no convolution"):
        ccp.patch(model(), where="nowhere")


def test_a_selector_that_sees_one_site() -> None:
    patched = ccp.patch(model(), where=lambda site: site.kernel_size == (3, 3))
    assert [status.name for status in ccp.layer_status(patched)] == ["0"]


def test_the_lowering_of_the_page(tmp_path: Path) -> None:
    code = PAGE.read_text(encoding="utf-8").split("```python")
    (block,) = [part.split("```")[0] for part in code if "class HalfMap(Sum)" in part]
    names: dict[str, Any] = {"ccp": ccp, "CoordConstant": CoordConstant, "Sum": Sum}
    exec(block.split("report = ")[0], names)
    patched = ccp.patch(model(), "all")
    for weight in ccp.coord_parameters(patched):
        nn.init.normal_(weight)
    x: Tensor = torch.randn(2, 3, 9, 8)
    options: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "tolerance": 1e-2}
    report = ccp.export_onnx(patched, tmp_path / "m.onnx", x, lowering="half_map", **options)
    assert set(report.lowerings.values()) == {"half_map"}
    session = onnxruntime.InferenceSession(report.path, providers=options["providers"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = patched(x)
    difference = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 1e-2  # the map is in half precision, so it is not exact


def test_the_channel_block_of_the_page(tmp_path: Path) -> None:
    code = PAGE.read_text(encoding="utf-8").split("```python")
    (block,) = [part.split("```")[0] for part in code if "class Diagonal(" in part]
    names: dict[str, Any] = {"ccp": ccp, "plain": model(), "__name__": __name__}
    exec(block, names)
    patched, plain, x = names["model"], model(), torch.randn(2, 3, 9, 8)
    assert torch.equal(patched(x), plain(x))
    for weight in ccp.coord_parameters(patched):
        nn.init.normal_(weight)
    row, column = ((torch.arange(9) + 0.5) / 9)[:, None], (torch.arange(8) + 0.5) / 8
    x_line, y_line = torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 9)
    channels = torch.stack(
        (x_line.expand(9, 8), y_line[:, None].expand(9, 8), ((row + column) / 2) ** 2)
    )
    layer = patched[0]
    joined = torch.cat((x, channels.expand(2, 3, 9, 8)), dim=1)
    weight = torch.cat((layer.weight, layer.coord_weight), dim=1)
    expected = plain[1:](nn.functional.conv2d(joined, weight, layer.bias))
    torch.testing.assert_close(patched(x), expected, rtol=1e-5, atol=1e-5)
    options: dict[str, Any] = {"providers": ["CPUExecutionProvider"]}
    ccp.export_onnx(patched, tmp_path / "m.onnx", x, **options)
    ccp.save_coords(patched, tmp_path / "c.safetensors")
    assert torch.equal(ccp.load_coords(plain, tmp_path / "c.safetensors")(x), patched(x))
    del BLOCKS["diagonal"]
    with pytest.raises(ccp.WeightsError, match="no kind of channel block 'diagonal' is known here"):
        ccp.load_coords(plain, tmp_path / "c.safetensors")


def test_the_page_names_files_that_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in (
        *("lowering/test_registry", "export/test_rewrites", "cli/test_sources"),
        "channels/test_fields",
    ):
        assert f"tests/{name}.py" in text
        assert (Path(__file__).parents[1] / f"{name}.py").is_file()
