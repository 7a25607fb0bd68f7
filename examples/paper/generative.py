"""What the VAE and the GAN share: the nets compared, their films, and how a picture shows them.

The nets differ in what paints the picture:

- ``deconv``: a fully connected layer draws the first 4 x 4 map, and so may know positions;
- ``tiled``: the latent is repeated over a 16 x 16 map, as in the paper's networks that paint from
  coordinates (Watters et al. 2019 call it a spatial broadcast decoder). What a plain net knows
  of positions there leaks in through zero padding.

The control of the tiled net is patched with scrambled coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coloured_shapes import presence, stencils
from experiment import Options, Record, Run
from film_strips import draw, from_text, to_text
from interpolation import Movement, movement
from palette import BY_VARIANT
from torch import Tensor

FRAMES = 33
"""Frames of a film: a square sliding from corner to corner takes steps of 1.1 pixels."""
FILMS = 64
"""Films measured: between successive latents."""
COMPARED = (
    ("deconv", "plain"),
    ("deconv", "patched"),
    ("tiled", "plain"),
    ("tiled", "patched"),
    ("tiled", "scrambled"),
)


def square_movement(films: Tensor) -> Movement:
    """Movement of the square in films ``(films, frames, 3, 32, 32)``."""
    return movement(presence(films)[:, :, :1], stencils()[:1])


def kept_films(films: Tensor) -> dict[str, list[str]]:
    """The first two films, every third frame, for :func:`draw_films`."""
    return {"films": [to_text(film[::3]) for film in films[:2]]}


def compare(record: Record, train: Callable[[str, str, Options], Run]) -> None:
    """Train every net that is compared, with every seed.

    Args:
        record: Gets the runs.
        train: From a setting, a variant and the options to a run.
    """
    for seed in record.options.seeds:
        for setting, variant in COMPARED:
            record.run(
                *(setting, variant, seed),
                lambda s=setting, v=variant: train(s, v, record.options),
            )


def label(compared: tuple[str, str], separator: str = " ") -> str:
    """What pictures call a net."""
    setting, variant = compared
    return f"{setting}, {variant}" + f"{separator}coordinates" * (variant == "scrambled")


def draw_films(axes: list[Any], record: Record) -> None:
    """Show the kept films of the first seed, one net on each of the axes."""
    for row, compared in zip(axes, COMPARED, strict=True):
        first, second = (from_text(text) for text in record.of(*compared)[0].extra["films"])
        draw(row, torch.cat([first, torch.ones_like(first[:1]), second]))
        title = {"loc": "left", "fontsize": 11, "fontweight": "bold"}
        row.set_title(label(compared), color=BY_VARIANT[compared[1]], **title)


def draw_shares(axes: Any, record: Record, metric: str, title: str) -> None:
    """Show a metric that is a part of 1: bars of its means, dots of every seed."""
    for place, compared in enumerate(COMPARED):
        colour = BY_VARIANT[compared[1]]
        values = [100 * run.metrics[metric] for run in record.of(*compared)]
        axes.barh(place, sum(values) / len(values), color=colour, alpha=0.5)
        axes.plot(values, [place] * len(values), "o", color=colour, ms=5)
    axes.set(title=title, xlabel="%", xlim=(0, 105), ylim=(len(COMPARED) - 0.4, -0.6))
    axes.set_yticks(range(len(COMPARED)), [label(c, "\n") for c in COMPARED], fontsize=9)


def sliding_headline(record: Record, model: str) -> str:
    """What came out, in two lines."""
    shares = [f"{record.mean(*c, 'sliding_films'):.0%}" for c in COMPARED]
    return (
        "{}: squares slide along {} of the interpolations of a deconv net, patched {};\n"
        "with the latent tiled over the map along {}, patched {}, scrambled {}"
    ).format(model, *shares)
