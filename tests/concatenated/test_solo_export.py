"""A model that makes coordinates in its own forward: exported with dynamic sizes once imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coordconv_ports as ports
import onnxruntime
import pytest
import torch
from old_torch import BEFORE_2_9

import coordconv_patch as ccp

CPU = ["CPUExecutionProvider"]
OPTIONS: dict[str, Any] = {"dynamic_size": True, "providers": CPU}


def test_the_sizes_are_frozen_before_and_dynamic_after(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ports.Solo().eval()
    x = torch.randn(2, 3, 32, 40)
    # torch.fx of older versions cannot trace the coordinates that this model makes.
    where = "head.ins_convs.0" if BEFORE_2_9 else "first"
    with pytest.raises(ccp.ExportError, match="ONNX Runtime cannot run the graph on"):
        ccp.export_onnx(ccp.patch(model, where), tmp_path / "before.onnx", x, **OPTIONS)
    imported = ccp.import_coordconv(model, x).model
    report = ccp.export_onnx(imported, tmp_path / "after.onnx", x, **OPTIONS)
    assert report.lowerings == {"head.ins_convs.0": "computed"}
    session = onnxruntime.InferenceSession(report.path, providers=CPU)
    for size in ((32, 40), (72, 56)):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            ins, cate = model(image)  # the model as it was, concatenation and all
        got = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        for expected, output in zip([*ins, *cate], got, strict=True):
            difference = (torch.from_numpy(output) - expected).abs().max()
            assert difference < 2e-6 * expected.abs().max()
