"""Crops and tiles: which frame is the target in?

    python examples/places/crops_and_tiles.py

Two tasks whose answer lies in the whole picture, while the net sees a part of it:

- *crops*: a digit on a canvas of 64 pixels. Training sees random crops of 24 to 64 pixels a side,
  stretched to 48 x 48, and is to say where on the *canvas* the digit is.
- *tiles*: digits on a canvas of 256 pixels; those in the upper left quarter are of class 0, upper
  right 1, lower left 2, lower right 3. Training sees single tiles of 64 pixels and gives each
  pixel of ink its class; tested on whole pictures, tile by tile and at once.

Each is learnt by four nets, equal but for what they know of places: the plain one; one that is
patched, whose coordinates are those of the crop or tile; one that is patched and told by
``ccp.places`` which part it sees; and, for control, one that is told the place of another sample.
Leaves ``crops_and_tiles.json`` and ``crops_and_tiles.png`` in ``results/``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))  # what all experiments share

import torch
import torch.nn.functional as F
from experiment import Options, Record, Run, Stopwatch, count_parameters, parse_options
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from not_so_clevr_packing import pack_positions, unpack_positions
from not_so_clevr_pictures import new_figure, plain_axes, save
from palette import BLUE, GREEN, GRID, INK, ORANGE, PURPLE, VERMILION
from scattered_digits import Layout, Scenes, scatter, training_and_test_digits
from torch import Tensor, nn

import coordconv_patch as ccp

RESULTS = Path(__file__).parent / "results"
CROPS, TILES = "crops", "tiles"
PLAIN, ALONE, PLACED, WRONG = "plain", "patched", "patched, places", "patched, others' places"
VARIANTS = (PLAIN, ALONE, PLACED, WRONG)
COLOURS = {PLAIN: VERMILION, ALONE: ORANGE, PLACED: BLUE, WRONG: PURPLE}

CANVAS, CROP = 64, 48
LARGE, TILE = 256, 64
CLASS_LETTERS = "0123."
"""The quarters, and what is not ink; a class of -1 counts from the end."""
CLASS_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "white")
ERROR, WHOLE_ERROR = "error on crops, px", "error on whole canvases, px"
BY_TILES, AT_ONCE, SEAM = "right, tile by tile", "right, at once", "tiles and whole agree"


def main(arguments: list[str] | None = None) -> Record:
    """Run the experiment, or what its record lacks, and draw it."""
    options = parse_options(__doc__, arguments, RESULTS)
    record = Record("crops_and_tiles", options)
    for setting, train in ((CROPS, train_on_crops), (TILES, train_on_tiles)):
        for variant in VARIANTS:
            for seed in options.seeds:
                record.run(setting, variant, seed, lambda t=train, v=variant: t(v, options))
    record.print_table()
    draw(record, options.out / "crops_and_tiles.png")
    return record


# --- what both share ------------------------------------------------------------------------------


def convolutions(outputs: int) -> nn.Sequential:
    """Small convolutions without stride, each with a batch norm; the last one gives ``outputs``."""
    layers: list[nn.Module] = []
    widths = (1, 16, 24, 24)
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], outputs, 1))


class Localiser(nn.Module):
    """Says where the digit is: convolutions at half the size, and an average."""

    def __init__(self) -> None:
        super().__init__()
        self.features = convolutions(32)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, images: Tensor) -> Tensor:
        """The centre (x, y) in parts of the canvas, shape ``(N, 2)``, of ``(N, 1, S, S)``."""
        maps = self.features(F.avg_pool2d(images, 2))
        return self.head(maps.amax((2, 3))) + 0.5


def as_variant(model: nn.Module, variant: str) -> nn.Module:
    return model if variant == PLAIN else ccp.patch(model, "all")


def seen_at(model: nn.Module, variant: str, theta: Tensor) -> Any:
    """What a variant is told of the places of its samples."""
    if variant == PLACED:
        return ccp.places(model, theta)
    if variant == WRONG:
        return ccp.places(model, theta.roll(1, 0))
    return nullcontext()


def fit(model: nn.Module, steps: int, loss: Callable[[], Tensor]) -> float:
    """Adam with a rate that falls to zero; returns the CPU seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    stopwatch = Stopwatch()
    with stopwatch:
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return stopwatch.seconds


# --- crops ----------------------------------------------------------------------------------------


def random_crops(count: int, generator: torch.Generator) -> Tensor:
    """Squares of 24 to 64 pixels anywhere on the canvas, as places: shape ``(N, 2, 3)``."""
    side = 24 + (CANVAS - 24) * torch.rand(count, 1, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (CANVAS - side)
    theta = torch.zeros(count, 2, 3)
    theta[:, [0, 1], [0, 1]] = side / CANVAS
    theta[:, :, 2] = (2 * corner + side) / CANVAS - 1
    return theta


def cut(images: Tensor, theta: Tensor, size: int) -> Tensor:
    """The parts of pictures that lie at their places, as pictures of ``size`` pixels a side."""
    grid = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def holds_centre(theta: Tensor, centres: Tensor) -> Tensor:
    """Whether each centre, in parts of the canvas, lies in its crop."""
    scale = theta[:, [0, 1], [0, 1]]
    return ((centres * 2 - 1 - theta[:, :, 2]).abs() < scale).all(1)


def centres_of(scenes: Scenes) -> Tensor:
    return scenes.boxes[:, 0].reshape(-1, 2, 2).mean(1) / CANVAS


def crops_that_show(scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of pictures, their places, and where their digits are on the canvas."""
    centres = centres_of(scenes)
    theta = random_crops(len(scenes), generator)
    while not (shown := holds_centre(theta, centres)).all():
        theta = torch.where(shown[:, None, None], theta, random_crops(len(scenes), generator))
    return cut(scenes.images, theta, CROP), theta, centres


def train_on_crops(variant: str, options: Options) -> Run:
    """Learn to say where on the canvas the digit of a crop is."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(canvas=CANVAS, digits=1, sizes=(10.0, 16.0))
    training, test = training_and_test_digits()
    scenes = scatter(training, 400 if options.quick else 4000, layout, generator)
    held_out = scatter(test, 100 if options.quick else 1000, layout, generator)
    model = as_variant(Localiser(), variant)
    steps = options.length(1500, 30)

    def loss() -> Tensor:
        chosen = torch.zeros(len(scenes), dtype=torch.bool)
        chosen[torch.randint(len(scenes), (32,))] = True
        images, theta, centres = crops_that_show(scenes.of(chosen), torch.default_generator)
        with seen_at(model, variant, theta):
            return F.smooth_l1_loss(model(images), centres, beta=0.02)

    seconds = fit(model, steps, loss)
    images, theta, centres = crops_that_show(held_out, generator)
    whole = torch.eye(2, 3).repeat(len(held_out), 1, 1)
    answers = {}
    for metric, shown, place in (
        (ERROR, images, theta),
        (WHOLE_ERROR, cut(held_out.images, whole, CROP), whole),
    ):
        with torch.no_grad(), seen_at(model, variant, place):
            answers[metric] = model(shown)
    metrics = {
        metric: float((positions - centres).norm(dim=1).median() * CANVAS)
        for metric, positions in answers.items()
    }
    extra = {
        "true": pack_positions(centres[:200] * CANVAS),
        "answers": pack_positions(answers[ERROR][:200] * CANVAS),
    }
    return Run(count_parameters(model), steps, seconds, metrics, extra=extra)


# --- tiles ----------------------------------------------------------------------------------------


def quarters(ink: Tensor) -> Tensor:
    """The class of each pixel of ink by its place on the large canvas, -1 elsewhere."""
    half = torch.arange(LARGE) >= LARGE // 2
    classes = 2 * half[:, None].long() + half[None]
    return torch.where(ink[:, 0] > 0.3, classes, -1)


def tile_windows() -> list[ccp.Window]:
    """The tiles of a large picture, row by row."""
    starts = range(0, LARGE, TILE)
    return [
        ccp.Window((top, left), (TILE, TILE), (LARGE, LARGE)) for top in starts for left in starts
    ]


def tiles_of(pictures: Tensor, windows: list[ccp.Window]) -> Tensor:
    """One tile a window of one picture ``(C, S, S)``: shape ``(N, C, 64, 64)``."""
    return torch.stack(
        [
            pictures[..., int(top) : int(top) + TILE, int(left) : int(left) + TILE]
            for top, left in (window.offset for window in windows)
        ]
    )


def random_tiles(scenes: Scenes, classes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles anywhere on the large pictures, the classes of their pixels, and their places."""
    which = torch.randint(len(scenes), (count,))
    corners = torch.randint(0, LARGE - TILE + 1, (count, 2)).tolist()
    images, wanted, theta = [], [], []
    for picture, (top, left) in zip(which.tolist(), corners, strict=True):
        window = ccp.Window((top, left), (TILE, TILE), (LARGE, LARGE))
        images.append(tiles_of(scenes.images[picture], [window])[0])
        wanted.append(tiles_of(classes[picture], [window])[0])
        theta.append(window.theta())
    return torch.stack(images), torch.stack(wanted), torch.stack(theta)


def train_on_tiles(variant: str, options: Options) -> Run:
    """Learn the class of ink by its quarter of the large canvas, from tiles."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(canvas=LARGE, digits=40, sizes=(12.0, 20.0))
    training, test = training_and_test_digits()
    scenes = scatter(training, 10 if options.quick else 60, layout, generator)
    held_out = scatter(test, 4 if options.quick else 20, layout, generator)
    classes, held_out_classes = quarters(scenes.images), quarters(held_out.images)
    model = as_variant(convolutions(4), variant)
    steps = options.length(400, 12)

    def loss() -> Tensor:
        images, wanted, theta = random_tiles(scenes, classes, 12)
        with seen_at(model, variant, theta):
            return F.cross_entropy(model(images), wanted, ignore_index=-1)

    seconds = fit(model, steps, loss)
    windows = tile_windows()
    place = torch.stack([window.theta() for window in windows])
    right = {BY_TILES: 0, AT_ONCE: 0, SEAM: 0}
    pixels, shown = 0, None
    for image, wanted in zip(held_out.images, held_out_classes, strict=True):
        with torch.no_grad():
            with seen_at(model, variant, place):
                by_tiles = stitched(model(tiles_of(image, windows)).argmax(1))
            whole = torch.eye(2, 3)[None]
            with seen_at(model, variant, whole):
                at_once = model(image[None]).argmax(1)[0]
        ink = wanted >= 0
        pixels += int(ink.sum())
        right[BY_TILES] += int((by_tiles == wanted)[ink].sum())
        right[AT_ONCE] += int((at_once == wanted)[ink].sum())
        right[SEAM] += int((by_tiles == at_once)[ink].sum())
        shown = torch.where(ink, by_tiles, -1) if shown is None else shown
    assert shown is not None
    metrics = {name: count / pixels for name, count in right.items()}
    extra = {"classes": ["".join(CLASS_LETTERS[c] for c in row) for row in shown[::2, ::2]]}
    return Run(count_parameters(model), steps, seconds, metrics, extra=extra)


def stitched(tiles: Tensor) -> Tensor:
    """Tiles in their order as one picture: ``(16, 64, 64)`` to ``(256, 256)``."""
    side = LARGE // TILE
    return tiles.reshape(side, side, TILE, TILE).transpose(1, 2).reshape(LARGE, LARGE)


# --- the picture ----------------------------------------------------------------------------------


def draw(record: Record, path: Path) -> None:
    """Draw the first seed's answers: on crops, and on one large picture by tiles."""
    figure, body = new_figure(
        13,
        7.6,
        "A net that sees a part of a picture knows where in the whole it looks if it is told",
        "Above: a dot is the answer to a held-out crop, a grey line leads to the truth. Below: "
        "colours are the quarters that the net names,\ntile by tile. First seed; figures of each.",
    )
    rows = body.subplots(2, len(VARIANTS))
    for column, variant in enumerate(VARIANTS):
        _draw_crops(rows[0, column], record, variant)
        _draw_tiles(rows[1, column], record, variant)
    rows[0, 0].set_ylabel("crops: where on the canvas\nis the digit?", color=INK, size=11)
    rows[1, 0].set_ylabel("tiles: in which quarter of the\nlarge canvas?", color=INK, size=11)
    save(figure, path)


def _draw_crops(axes: Any, record: Record, variant: str) -> None:
    extra = record.of(CROPS, variant)[0].extra
    true, answers = (unpack_positions(extra[name]) for name in ("true", "answers"))
    lines = torch.stack((true, answers), 1).numpy()
    axes.add_collection(LineCollection(lines, colors="#9CA3AF", lw=0.8, alpha=0.6, zorder=1))
    axes.scatter(*answers.T.numpy(), s=7, color=COLOURS[variant], zorder=2, lw=0)
    axes.set(xlim=(0, CANVAS), ylim=(CANVAS, 0), aspect="equal")
    errors = _by_seed(record, CROPS, variant, ERROR, "{:.1f}")
    _finish(axes, f"{variant}\n{errors} px off", variant)


def _draw_tiles(axes: Any, record: Record, variant: str) -> None:
    rows = record.of(TILES, variant)[0].extra["classes"]
    classes = [[CLASS_LETTERS.index(letter) for letter in row] for row in rows]
    axes.imshow(
        classes, cmap=ListedColormap(CLASS_COLOURS), extent=(0, LARGE, LARGE, 0), vmin=0, vmax=4
    )
    for at in range(TILE, LARGE, TILE):
        axes.axhline(at, color=GRID, lw=0.6)
        axes.axvline(at, color=GRID, lw=0.6)
    shares = _by_seed(record, TILES, variant, BY_TILES, "{:.0%}")
    _finish(axes, f"{shares} of the ink right", variant)


def _by_seed(record: Record, setting: str, variant: str, metric: str, form: str) -> str:
    return ", ".join(form.format(run.metrics[metric]) for run in record.of(setting, variant))


def _finish(axes: Any, title: str, variant: str) -> None:
    axes.set_title(title, loc="left", size=10.5, color=COLOURS[variant], weight="bold")
    plain_axes(axes)
    axes.grid(visible=False)


if __name__ == "__main__":
    main()
