"""The demo's one picture: what stayed the same, what was learned, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from coordconv_patch.contributions.coordinate_maps import coordinate_maps
from coordconv_patch.contributions.map_picture import draw_maps
from coordconv_patch.demo.backbone import to_input
from coordconv_patch.demo.report import DemoReport
from coordconv_patch.demo.task import Pictures, photograph
from coordconv_patch.errors import ExportError
from coordconv_patch.files.picture_file import write_figure

__all__ = ["draw"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
CONTROL = "#D55E00"
PATCHED = "#0072B2"
UNCHANGED = "#009E73"
MUTED = "#6B7280"
INK = "#1F2933"

SHOWN_PICTURES = 16
SHOWN_MAPS = 12

NAMES = {"control": "control, no coordinates", "patched": "patched"}
COLOURS = {"control": CONTROL, "patched": PATCHED}
MARKERS = {"control": "X", "patched": "o"}


def draw(
    report: DemoReport,
    held_out: Pictures,
    answers: Mapping[str, Tensor],
    patched: nn.Module,
    path: Path,
) -> None:
    """Draw the report into a PNG file.

    ``answers`` are the positions in pixels, shape ``(N, 2)``, that ``control`` and ``patched`` give
    on the held-out pictures.
    """
    figure = Figure(figsize=(15, 14.5), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(4, 1, height_ratios=[1.5, 3.3, 4.5, 4.5], hspace=0.02)
    header, photographs, pictures, charts = parts
    _draw_header(header, report)
    _draw_photographs(photographs, report)
    _draw_pictures(pictures, report, held_out, answers)
    left, middle, right, maps = charts.subplots(1, 4, width_ratios=[1.1, 1, 1, 0.8])
    _draw_curves(left, report)
    _draw_histogram(middle, held_out, answers)
    _draw_shares(right, report)
    _draw_maps(maps, report, coordinate_maps(patched, held_out.images[:1]))
    write_figure(figure, path, ExportError)


def _draw_header(part: Any, report: DemoReport) -> None:
    for line, finding in enumerate(report.findings()):
        text = finding[:1].upper() + finding[1:]
        part.text(0.01, 0.84 - 0.29 * line, text, size=17, weight="bold", color=INK, va="center")
    part.text(
        0.01,
        0.16,
        "Median distance from the cup's centre on held-out pictures of "
        f"{report.picture_size} × {report.picture_size} px, after "
        f"{report.settings.steps} steps of {report.settings.batch_size} pictures in all.\n"
        f"{report.backbone} with ImageNet weights; {len(report.sites)} convolutions patched, "
        f"{report.coord_parameters:,} coordinate weights beside {report.model_parameters:,}; "
        f"seed {report.seed}.",
        linespacing=1.5,
        size=12,
        color=MUTED,
        va="center",
    )


def _draw_photographs(part: Any, report: DemoReport) -> None:
    finding = (
        f"Patching changes nothing: all {report.logits:,} logits are equal to the last bit"
        if report.logits_equal
        else f"Patching changed some of the {report.logits:,} logits"
    )
    _heading(part, finding)
    panels = part.subplots(1, len(report.photographs))
    for axes, result in zip(panels, report.photographs, strict=True):
        axes.imshow(_as_picture(to_input(photograph(result.name), 320)[0]))
        _frame(axes)
        same = result.before == result.after
        axes.set_xlabel(
            f"before: {result.before[0]}\nafter:  {result.after[0]}",
            color=UNCHANGED if same else CONTROL,
            size=11.5,
            linespacing=1.4,
        )


def _draw_pictures(
    part: Any, report: DemoReport, held_out: Pictures, answers: Mapping[str, Tensor]
) -> None:
    count = min(SHOWN_PICTURES, len(held_out))
    sources = " and ".join(report.held_out_photographs)
    _heading(
        part,
        f"Where is the cup? The first {count} of {len(held_out)} held-out pictures, "
        f"on photographs never trained on ({sources})",
    )
    size = held_out.images.shape[-1]
    grid = part.subplots(2, count // 2)
    for index, axes in enumerate(grid.flat):
        axes.imshow(_as_picture(held_out.images[index]), interpolation="bicubic")
        x, y = held_out.centers[index].tolist()
        axes.plot(x, y, "+", color="white", ms=20, mew=4.5)
        axes.plot(x, y, "+", color="black", ms=18, mew=1.8)
        for name, colour in COLOURS.items():
            # An answer outside of the picture is drawn at its border.
            x, y = answers[name][index].clamp(0, size - 1).tolist()
            axes.plot(x, y, MARKERS[name], color=colour, ms=8, mec="white", mew=1.2)
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        _frame(axes)
    handles = [Line2D([], [], ls="", marker="+", color="black", ms=13, mew=2, label="truth")]
    handles += [
        Line2D([], [], ls="", marker=MARKERS[name], color=colour, ms=9, label=NAMES[name])
        for name, colour in COLOURS.items()
    ]
    part.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=12)


def _draw_curves(axes: Any, report: DemoReport) -> None:
    for name, colour in COLOURS.items():
        curve = report.curves[name]
        axes.plot(
            range(len(curve.batch_errors)), curve.batch_errors, color=colour, lw=0.8, alpha=0.35
        )
        axes.plot(curve.steps, curve.median_errors, "-", marker="o", ms=4, color=colour, lw=2)
        axes.annotate(
            f"{curve.median_errors[-1]:.1f}",
            (curve.steps[-1], curve.median_errors[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            weight="bold",
            va="center",
        )
    middle = report.errors["always the middle"].median
    axes.axhline(middle, color=MUTED, lw=1, ls=":")
    axes.annotate(
        "always the middle",
        (report.settings.steps, middle),
        xytext=(0, 3),
        textcoords="offset points",
        color=MUTED,
        ha="right",
        size=8.5,
    )
    axes.set_yscale("log")
    _mark_phases(axes, report)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks([tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick >= axes.get_ylim()[0]])
    axes.minorticks_off()
    axes.set_xlim(0, report.settings.steps * 1.14)
    axes.set_xlabel("fine-tuning step")
    axes.set_ylabel("error, px (line: held-out median, faint: batch mean)")
    _title(axes, _curve_finding(report))
    _plain(axes)


def _mark_phases(axes: Any, report: DemoReport) -> None:
    begin = 0
    for number, phase in enumerate(report.settings.phases):
        if number % 2:
            axes.axvspan(begin, begin + phase.steps, color="#F1F3F5", lw=0, zorder=0)
        axes.annotate(
            phase.title.replace(" trained", "\ntrained"),
            (begin + phase.steps / 2, 0.01),
            xycoords=("data", "axes fraction"),
            color=MUTED,
            ha="center",
            size=9.5,
        )
        begin += phase.steps


def _curve_finding(report: DemoReport) -> str:
    """When each model first came within 10 px for half of the held-out pictures."""
    goal = 10
    parts = []
    for name in ("patched", "control"):
        curve = report.curves[name]
        measured = zip(curve.steps, curve.median_errors, strict=True)
        reached = [f"by step {step}" for step, error in measured if error <= goal]
        parts.append(f"{name} {reached[0] if reached else 'not yet'}")
    return f"Half within {goal} px:\n" + ", ".join(parts)


def _draw_histogram(axes: Any, held_out: Pictures, answers: Mapping[str, Tensor]) -> None:
    errors = {name: (answers[name] - held_out.centers).norm(dim=1) for name in COLOURS}
    top = float(torch.cat(list(errors.values())).quantile(0.97))
    edges = torch.linspace(0, top, 25).tolist()
    for name, colour in COLOURS.items():
        clipped = errors[name].clamp(max=top).numpy()
        axes.hist(clipped, edges, color=colour, alpha=0.3)
        axes.hist(clipped, edges, color=colour, histtype="step", lw=1.8)
    near = float((errors["patched"] < errors["control"]).float().mean())
    axes.set_xlabel(f"error, px (last bar: {top:.0f} px and more)")
    axes.set_ylabel("held-out pictures")
    axes.set_xlim(0, top)
    _title(axes, f"Coordinates came closer\non {near:.0%} of the held-out pictures")
    _plain(axes)


def _draw_shares(axes: Any, report: DemoReport) -> None:
    shares = report.site_shares
    best = max(shares, key=shares.__getitem__)
    colours = [PATCHED if name == best else "#9CC4DF" for name in shares]
    axes.barh(range(len(shares)), list(shares.values()), color=colours)
    axes.set_yticks(range(len(shares)), map(_short, shares), size=9)
    axes.invert_yaxis()
    axes.set_xlabel("variation from coordinates / from the picture")
    share = f"{shares[best]:.0%} as much as the picture"
    _title(axes, f"Place counts most in {_short(best)}:\n{share}")
    _plain(axes)


def _draw_maps(axes: Any, report: DemoReport, maps: Mapping[str, Tensor]) -> None:
    finest = max(images.shape[1] for images in maps.values())
    finest_sites = [name for name, images in maps.items() if images.shape[1] == finest]
    site = max(finest_sites, key=report.site_shares.__getitem__)
    drawn, _ = draw_maps(axes, maps[site], channels=SHOWN_MAPS, columns=3)
    _title(axes, f"What {_short(site)} adds,\n{drawn} strongest channels")


def _short(site: str) -> str:
    return site.replace("blocks.", "").replace("conv_", "")


def _as_picture(image: Tensor) -> Any:
    """From ``(3, H, W)``, -1 to 1, to what imshow takes."""
    return ((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def _heading(part: Any, text: str) -> None:
    part.suptitle(text, x=0.01, ha="left", size=14, weight="bold", color=INK)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", size=12, weight="bold", color=INK, linespacing=1.3)


def _frame(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
