"""What a crop, a tile and a padded batch see of coordinates, without places and with them.

    python examples/places/what_samples_see.py

Draws ``docs/places.jpg``. The lines on each picture are what a layer in a model gets there: where
its coordinates x and y are -1, -0.75, ..., 1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))  # what all pictures share

import torch
import torch.nn.functional as F
from not_so_clevr_pictures import new_figure
from palette import BLUE, INK, VERMILION
from skimage import data
from torch import Tensor, nn

import coordconv_patch as ccp

PICTURE = Path(__file__).parents[2] / "docs" / "places.jpg"
LEVELS = [step / 4 for step in range(-4, 5)]


class SeenCoordinates(nn.Module):
    """A patched 1x1 convolution that gives what coordinates it sees: x and y."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 2, 1, bias=False)
        nn.init.zeros_(conv.weight)
        self.conv = ccp.patch(conv, coords=ccp.Coordinates(align_corners=False))
        (weight,) = ccp.coord_parameters(self.conv)
        with torch.no_grad():
            weight.copy_(torch.eye(2)[:, :, None, None])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Shape ``(N, 2, H, W)`` of images ``(N, 3, H, W)``."""
        return self.conv(images)


def main() -> None:
    """Draw the picture."""
    whole = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float()[None] / 255
    crop = ccp.Window((20, 120), (260, 260), (512, 512))
    tile = ccp.Window((256, 0), (256, 256), (512, 512))
    # A small picture beside a larger one: the batch has the larger one's size.
    padded = F.pad(F.interpolate(whole, size=(288, 288), mode="area"), (0, 224, 0, 224), value=0.5)
    scale = 512 / 288
    columns = [
        ("the whole picture", whole, torch.eye(2, 3)),
        ("a crop, stretched", cut(whole, crop), crop),
        ("the tile at the lower left", cut(whole, tile), tile),
        (
            "padded, beside a larger picture",
            padded,
            torch.tensor([[scale, 0, scale - 1], [0, scale, scale - 1]]),
        ),
    ]
    seen = SeenCoordinates()
    figure, body = new_figure(
        13,
        8,
        "Without places, coordinates are those of the input; with places, of the picture",
        "Lines of equal x (blue) and y (orange), from -1 to 1 in steps of a quarter; thick at 0.",
    )
    rows = body.subplots(2, len(columns))
    for at, (name, image, place) in enumerate(columns):
        draw(rows[0, at], image, seen(image))
        with ccp.places(seen, place):
            draw(rows[1, at], image, seen(image))
        rows[0, at].set_title(name, loc="left", size=11.5, color=INK)
    rows[0, 0].set_ylabel("without places", size=12, weight="bold", color=INK)
    rows[1, 0].set_ylabel("with places", size=12, weight="bold", color=INK)
    figure.savefig(PICTURE, pil_kwargs={"quality": 85})


def cut(image: Tensor, window: ccp.Window) -> Tensor:
    """A window of a picture, stretched to 512 pixels a side."""
    grid = F.affine_grid(window.theta()[None].float(), [1, 3, 512, 512], align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


def draw(axes: Any, image: Tensor, coordinates: Tensor) -> None:
    """A picture with the lines of its coordinates."""
    axes.imshow((0.35 + 0.65 * image[0].permute(1, 2, 0)).clamp(0, 1).numpy())
    height, width = image.shape[2:]
    for along, (channel, colour) in enumerate(zip(coordinates[0], (BLUE, VERMILION), strict=True)):
        line = channel[0] if along == 0 else channel[:, 0]
        shown = [level for level in LEVELS if line.min() < level < line.max()]
        are_close = (line < LEVELS[1]).sum() + 45 > (line < LEVELS[2]).sum() > 0
        note: dict[str, Any] = {"color": colour, "fontsize": 8.5}
        note["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        for level in shown:
            at = float((line < level).sum()) - 0.5
            draw_line = axes.axvline if along == 0 else axes.axhline
            draw_line(at, color=colour, lw=3.5 if level == 0 else 1.4)
            if are_close and level % 0.5:
                continue
            if along == 0:
                axes.text(at, height - 4, f"{level:g}", ha="center", va="bottom", **note)
            elif at < height - 40:
                axes.text(0, at, f"{level:g}", ha="left", va="center", **note)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    main()
