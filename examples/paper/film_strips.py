"""Films in records and pictures: PNG in base64 for JSON, strips of frames for matplotlib."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_text(film: Tensor) -> str:
    """A film ``(frames, 3, H, W)``, 0 to 1, as a PNG of all frames in a row, in base64."""
    pixels = (film.clamp(0, 1) * 255).round().byte()
    row = pixels.permute(2, 0, 3, 1).flatten(1, 2).numpy()
    png = io.BytesIO()
    Image.fromarray(row).save(png, "PNG", optimize=True)
    return base64.b64encode(png.getvalue()).decode()


def from_text(text: str) -> Tensor:
    """The film ``(frames, 3, H, H)``, 0 to 1, that :func:`to_text` stored; square frames."""
    row = np.array(Image.open(io.BytesIO(base64.b64decode(text))))
    height = row.shape[0]
    frames = torch.from_numpy(row).unflatten(1, (-1, height)).permute(1, 3, 0, 2)
    return frames.float() / 255


def draw(axes: Any, film: Tensor, gap: int = 2) -> None:
    """Show a film ``(frames, 3, H, W)``, white gaps (pixels) between its frames."""
    frames = torch.nn.functional.pad(film, (0, gap), value=1.0)
    picture = frames.permute(2, 0, 3, 1).flatten(1, 2)[:, :-gap]
    axes.imshow(picture.clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_axis_off()
