"""Run a folded model in ExecuTorch with XNNPACK, and compare it with torch.

ExecuTorch is not a dependency of the tests. It needs an environment of its own::

    python -m venv --system-site-packages FOLDER && FOLDER/bin/pip install executorch
    PYTHONPATH=. FOLDER/bin/python benchmarks/executorch_xnnpack.py

Each model has coordinates at every convolution (standard deviation 0.02). The record,
``benchmarks/results/executorch.json``, holds for the plain model and each way of folding, in
float32 and with int8 convolutions, the largest difference from the float outputs relative to the
largest output, the root mean square of the difference relative to that of the outputs, how many
parts went to XNNPACK, and how many operators stayed outside.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import coordconv_patch as ccp

ROOT = Path(__file__).resolve().parent
RECORD = ROOT / "results" / "executorch.json"
PAGE = ROOT.parent / "docs" / "compression.md"


def model_of(name: str) -> nn.Module:
    """A patched model with random coordinate weights, in evaluation mode."""
    torch.manual_seed(0)
    if name == "tiny":
        plain: nn.Module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, stride=2),
        )
    else:
        from torchvision.models import get_model

        plain = get_model(name.removeprefix("torchvision:"))
    model = ccp.patch(plain.eval(), "all")
    for weight in ccp.coord_parameters(model):
        nn.init.normal_(weight, std=0.02)
    return model


def in_int8(model: nn.Module, images: Tensor) -> nn.Module:
    """The model with int8 convolutions, by the quantizer that docs/compression.md shows."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    page = PAGE.read_text(encoding="utf-8")
    (block,) = [part for part in page.split("```python")[1:] if "class FloatCoordinates" in part]
    shown: dict[str, Any] = {"torch": torch}
    exec(block.split("\nclass Quantizer")[0], shown)
    parts = (shown["FloatCoordinates"], xnnpack_quantizer.XNNPACKQuantizer)
    quantizer = type("Quantizer", parts, {})()
    quantizer.set_global(xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    prepared(images)
    quantized: nn.Module = convert_pt2e(prepared)
    return quantized


def run(model: nn.Module, images: Tensor, expected: Tensor) -> dict[str, Any]:
    """Lower a model, run it in ExecuTorch's Python runtime, and compare its output."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(model, (images,))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    targets = [str(node.target) for node in edge.exported_program().graph.nodes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pte"
        path.write_bytes(edge.to_executorch().buffer)
        size = path.stat().st_size
        (output,) = Runtime.get().load_program(path).load_method("forward").execute([images])
    difference = (output - expected).abs().max() / expected.abs().max()
    return {
        "relative_difference": float(difference),
        "root_mean_square": float((output - expected).norm() / expected.norm()),
        "parts_in_xnnpack": targets.count("executorch_call_delegate"),
        "operators_outside": sum(target.startswith("<EdgeOpOverload") for target in targets),
        "file_bytes": size,
    }


def main() -> int:
    """Run every model, plain and folded in both ways, in float and int8; 1 if one is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tiny"], help="tiny, torchvision:NAME")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in options.models:
            for row in rows_of(name, options.size):
                rows.append(row)
                print(row, flush=True)
    record = {
        "torch": torch.__version__,
        "executorch": importlib.metadata.version("executorch"),
        "size": options.size,
        "rows": rows,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    in_float = [row["relative_difference"] for row in rows if row["numbers"] == "float32"]
    return int(max(in_float) > 1e-5)


def rows_of(name: str, size: int) -> Iterator[dict[str, Any]]:
    """A model's rows: at batch 1 and 2, by form, in float32 and in int8."""
    model = model_of(name)
    plain = ccp.unpatch(model, discard=True)
    for batch in (1, 2):
        images = torch.rand(batch, 3, size, size)
        forms = {
            "plain": plain,
            "fold, any size": ccp.fold(model),
            "fold, one size": ccp.fold(model, images),
        }
        for form, folded in forms.items():
            expected = folded(images)
            row = {"model": name, "batch": batch, "form": form}
            yield row | {"numbers": "float32"} | run(folded, images, expected)
            quantized = in_int8(folded, images)
            yield row | {"numbers": "int8"} | run(quantized, images, expected)


if __name__ == "__main__":
    sys.exit(main())
