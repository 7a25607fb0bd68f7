"""Pictures of coordinate maps: what the coordinates add to the outputs of convolutions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from coordconv_patch.arguments import check_example_inputs, check_names
from coordconv_patch.contributions.coordinate_maps import coordinate_maps
from coordconv_patch.errors import ArgumentError, SelectionError, excerpt, listing
from coordconv_patch.files.picture_file import check_picture, write_figure

__all__ = ["draw_maps", "plot_coords"]

_INK, _MUTED = "#1F2933", "#6B7280"
_COLOURS = "PuOr"
"""Orange below 0, white at 0, purple above; told apart with any colour vision."""
_MOST_SITES = 8
_MOST_CHANNELS = 256
"""In a row; matplotlib before 3.10 draws less than 2^16 pixels along an axis."""
_GAP = 0.06
"""Between two maps, as a part of a map's longer side."""


def plot_coords(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    sites: Sequence[str] | None = None,
    channels: int = 8,
) -> None:
    """Draw what the coordinates add to the outputs of a patched model's convolutions.

    Each site has a row: the maps of the output channels that vary most over the positions, each
    without its mean, which a bias could give too. A row has one scale, its title tells the largest
    value. Of volumes the middle slice is shown. The model is not changed.

    Args:
        model: A patched model.
        path: A .png, .svg or .pdf file.
        example_inputs: A tensor, or a tuple of positional arguments (a dict last is keyword
            arguments); the maps have the sizes that these give.
        sites: Names of the sites to show, in this order; ``None``: the 8 whose maps vary most, in
            order of execution.
        channels: The most channels to show of a site, at most 256.

    Raises:
        PatchError: If the model is not patched, cannot be copied, or fails on the inputs.
        SelectionError: If a site has no coordinates, or is not called.
        ArgumentError: If the file cannot be written, matplotlib is not installed, or another
            argument makes no sense.

    Example::

        ccp.plot_coords(model, "maps.png", images, sites=["conv1"])
    """
    path = check_picture(path)
    check_example_inputs(example_inputs, optional=False)
    check_names("sites", sites)
    if (
        isinstance(channels, bool)
        or not isinstance(channels, int)
        or not 1 <= channels <= _MOST_CHANNELS
    ):
        raise ArgumentError(
            f"channels={excerpt(channels)}: write how many to show, 1 to {_MOST_CHANNELS}"
        )
    maps = coordinate_maps(model, example_inputs)
    shown = _strongest(maps) if sites is None else _named(maps, sites)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (1 + 1.25 * channels, 0.6 + 1.6 * len(shown))
    figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    rows: Any = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, site in zip(rows, shown, strict=True):
        drawn, largest = draw_maps(axes, maps[site], channels=channels, columns=channels)
        of = f"{drawn} of {len(maps[site])} channels, {_size(maps[site])}"
        text = f"{site}   up to ±{largest:.2g}   ({of})" if largest else f"{site}   all 0   ({of})"
        axes.set_title(text, loc="left", size=9.5, color=_INK)
    legend = "What coordinates add. Purple: above the channel's mean, orange: below"
    figure.supxlabel(legend, x=0.01, ha="left", size=8.5, color=_MUTED)
    write_figure(figure, path)


def draw_maps(axes: Any, maps: Tensor, *, channels: int, columns: int) -> tuple[int, float]:
    """Draw the maps that vary most side by side, strongest first, each without its mean.

    Args:
        axes: matplotlib's.
        maps: Shape ``(C_out, *size)``.
        channels: The most maps to draw.
        columns: Maps in a line.

    Returns:
        How many were drawn, and the largest absolute value among them.
    """
    images = _as_images(maps)
    centred = images - images.mean(dim=(1, 2), keepdim=True)
    spread = centred.square().mean(dim=(1, 2))
    strongest = centred[spread.argsort(descending=True, stable=True)[:channels]]
    largest = float(strongest.abs().max())
    height, width = strongest.shape[1:]
    gap = _GAP * max(height, width)
    for index, tile in enumerate(strongest):
        row, column = divmod(index, columns)
        left, top = column * (width + gap), row * (height + gap)
        axes.imshow(
            tile.numpy(),
            cmap=_COLOURS,
            vmin=-(largest or 1.0),
            vmax=largest or 1.0,
            extent=(left, left + width, top + height, top),
            interpolation="nearest",
        )
        frame = {"fill": False, "ec": _MUTED, "lw": 0.5}
        axes.add_patch(_rectangle(left, top, width, height, frame))
    lines = -(-len(strongest) // columns)
    axes.set_xlim(0, columns * (width + gap) - gap)
    axes.set_ylim(lines * (height + gap) - gap, 0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return len(strongest), largest


def _rectangle(left: float, top: float, width: float, height: float, style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, top), width, height, clip_on=False, **style)


def _as_images(maps: Tensor) -> Tensor:
    """Maps as images ``(C_out, H, W)``: of signals a band, of volumes the middle slice."""
    if maps.dim() == 2:
        return maps.unsqueeze(1).expand(-1, max(1, maps.shape[1] // 4), -1)
    return maps[:, maps.shape[1] // 2] if maps.dim() == 4 else maps


def _strongest(maps: Mapping[str, Tensor]) -> list[str]:
    """The sites whose maps vary most over the positions, in order of execution."""
    spread = {
        site: float(images.flatten(1).var(dim=1, correction=0).mean())
        for site, images in maps.items()
    }
    kept = sorted(maps, key=spread.__getitem__, reverse=True)[:_MOST_SITES]
    return [site for site in maps if site in kept]


def _named(maps: Mapping[str, Tensor], sites: Sequence[str]) -> list[str]:
    """The sites asked for.

    Raises:
        SelectionError: If one of them has no map.
    """
    for site in sites:
        if site not in maps:
            raise SelectionError(
                f"sites: {excerpt(site)} has no coordinates, or the model did not call it; those "
                f"that have are {listing(maps)}"
            )
    if not sites:
        raise ArgumentError("sites=[]: name at least one, or leave sites out")
    return list(sites)


def _size(maps: Tensor) -> str:
    return " x ".join(map(str, maps.shape[1:]))
