"""The whole way on any timm model: patch, fine-tune for a few steps, save, export, run.

    python examples/quickstart.py --model resnet18 --pretrained --out quickstart

The data are random images whose label is the quadrant that holds a bright square, so
position is all that counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import timm
import torch
from torch import Tensor
from tqdm import tqdm

import coordconv_patch as ccp


def quadrant_batch(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, size, size)`` of noise with a bright square, and its quadrant 0 to 3."""
    images = 0.1 * torch.randn(count, 3, size, size, generator=generator)
    corners = torch.randint(0, size - size // 8, (count, 2), generator=generator)
    for image, (top, left) in zip(images, corners.tolist(), strict=True):
        image[:, top : top + size // 8, left : left + size // 8] += 1.0
    below, right = (corners + size // 16 >= size // 2).unbind(1)
    return images, 2 * below.long() + right.long()


def main(arguments: list[str] | None = None) -> ccp.ExportReport:
    """Run the example; returns the report of the export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--out", type=Path, default=Path("quickstart"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    model = timm.create_model(options.model, pretrained=options.pretrained, num_classes=4)
    images, labels = quadrant_batch(8, options.size, generator)
    print(ccp.plan(model, "first", example_inputs=images).summary())
    patched = ccp.patch(model, "first")
    assert torch.equal(model.eval()(images), patched.eval()(images))

    patched.train()
    optimizer = torch.optim.AdamW(ccp.param_groups(patched, lr=1e-3, coord_lr=1e-2))
    for _ in tqdm(range(options.steps), desc="fine-tuning", disable=None):
        images, labels = quadrant_batch(16, options.size, generator)
        loss = torch.nn.functional.cross_entropy(patched(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    patched.eval()
    ccp.save_coords(patched, options.out / "coords.safetensors")
    report = ccp.export_onnx(patched, options.out / "model.onnx", images)
    print(report)
    session = onnxruntime.InferenceSession(report.path, providers=[report.provider])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    print(f"last loss {loss.item():.3f}; {(logits.argmax(1) == labels.numpy()).mean():.0%} right")
    return report


if __name__ == "__main__":
    main()
