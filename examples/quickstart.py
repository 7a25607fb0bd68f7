"""The whole way in 70 lines: patch, fine-tune beside a plain control, save, export, run, show.

    pip install ".[demo]" && python examples/quickstart.py

The task is to say where a bright square is. The backbone is frozen: only the last layer is
trained, and in the patched model the coordinate weights.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import onnxruntime
import timm
import torch

import coordconv_patch as ccp

SIZE = 64  # pixels


def batch(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright square, (N, 3, H, W), and the square's centre (x, y), 0 to 1, (N, 2)."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    corners = torch.randint(0, SIZE - 7, (count, 2), generator=generator)
    for image, (x, y) in zip(images, corners.tolist(), strict=True):
        image[:, y : y + 8, x : x + 8] += 1
    return images, (corners + 4) / SIZE


def main(out: Path = Path("quickstart"), steps: int = 80) -> dict[str, float]:
    """Run the example; returns the median error in pixels of both models."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=2)  # pretrained=True for ImageNet weights
    patched = ccp.patch(plain, "all")
    images, targets = batch(256, seed=-1)
    assert torch.equal(patched.eval()(images), plain.eval()(images))  # nothing has changed
    plain.requires_grad_(False)
    ccp.train_only_coords_(patched)

    errors, (_, panels) = {}, plt.subplots(1, 2, figsize=(9, 5), sharex=True, sharey=True)
    for panel, (name, model) in zip(panels, (("plain", plain), ("patched", patched)), strict=True):
        model.train().get_classifier().requires_grad_(True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=steps)
        for step in range(steps):
            pictures, centres = batch(32, seed=step)
            optimizer.zero_grad()
            (model(pictures) - centres).abs().mean().backward()
            optimizer.step()
            schedule.step()
        ccp.export_onnx(model.eval(), out / f"{name}.onnx", images[:2])  # compared with torch
        session = onnxruntime.InferenceSession(out / f"{name}.onnx")
        (answers,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        lines = SIZE * torch.stack([targets, torch.from_numpy(answers)])
        errors[name] = (lines[1] - lines[0]).norm(dim=1).median().item()
        panel.plot(*lines[:, :64].permute(2, 0, 1), "C1", lw=1)  # from each square to the answer
        panel.plot(*lines[0, :64].T, "k.")
        panel.set(title=f"{name}: {errors[name]:.1f} px off", xlim=(0, SIZE), ylim=(SIZE, 0))
    ccp.save_coords(patched, out / "coords.safetensors")
    plt.savefig(out / "where_is_the_square.png")
    print(
        f"off by {errors['plain']:.1f} px without coordinates, {errors['patched']:.1f} px with them"
    )
    return errors


if __name__ == "__main__":
    main()
