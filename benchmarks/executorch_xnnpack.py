"""Run a folded model in ExecuTorch with XNNPACK, and compare it with torch.

ExecuTorch is not a dependency of the tests. It needs an environment of its own::

    python -m venv --system-site-packages FOLDER && FOLDER/bin/pip install executorch
    PYTHONPATH=. FOLDER/bin/python benchmarks/executorch_xnnpack.py

Each model has coordinates at every convolution (standard deviation 0.02). The record,
``benchmarks/results/executorch.json``, holds for each way of folding the largest difference
relative to the largest output, how many parts went to XNNPACK, and how many operators stayed
outside.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import coordconv_patch as ccp

ROOT = Path(__file__).resolve().parent
RECORD = ROOT / "results" / "executorch.json"


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


@torch.no_grad()
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
        "parts_in_xnnpack": targets.count("executorch_call_delegate"),
        "operators_outside": sum(target.startswith("<EdgeOpOverload") for target in targets),
        "file_bytes": size,
    }


def main() -> int:
    """Run every model, folded in both ways, at batch 1 and 2; 1 if an output is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tiny"], help="tiny, torchvision:NAME")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        model = model_of(name)
        for batch in (1, 2):
            images = torch.rand(batch, 3, options.size, options.size)
            expected = model(images).detach()
            forms = {"any size": ccp.fold(model), "one size": ccp.fold(model, images)}
            for form, folded in forms.items():
                row = {"model": name, "batch": batch, "fold": form}
                rows.append(row | run(folded, images, expected))
                print(rows[-1], flush=True)
    record = {
        "torch": torch.__version__,
        "executorch": importlib.metadata.version("executorch"),
        "size": options.size,
        "rows": rows,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(row["relative_difference"] > 1e-5 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
