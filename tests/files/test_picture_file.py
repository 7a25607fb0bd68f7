"""Pictures are written whole or not at all, and every failure is an error of the package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import coordconv_patch as ccp
from coordconv_patch.bench.picture import draw_bench
from coordconv_patch.contributions.picture import Bars, draw_influence
from coordconv_patch.errors import ArgumentError, ExportError
from coordconv_patch.files.picture_file import write_figure
from coordconv_patch.ranking.picture import draw_ranking

X = torch.rand(1, 3, 8, 8)


def patched() -> nn.Module:
    model = ccp.patch(nn.Sequential(nn.Conv2d(3, 4, 3)).eval())
    with torch.no_grad():
        ccp.coord_parameters(model)[0].normal_(generator=torch.Generator().manual_seed(0))
    return model


@contextmanager
def full_disk() -> Iterator[None]:
    """While entered, files cannot grow beyond 100 bytes."""
    import resource

    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the POSIX kind")
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
@pytest.mark.parametrize(
    "draw",
    [
        lambda path: ccp.plot_coords(patched(), path, X),
        lambda path: draw_influence(Bars(["a"], [0.5], None, [], "caption"), path),
        lambda path: write_figure(Figure(), path),
    ],
    ids=["maps", "influence", "any"],
)
def test_a_full_disk_leaves_the_old_picture(
    draw: Callable[[Path], None], ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    draw(path)
    before = path.read_bytes()
    with full_disk(), pytest.raises(ArgumentError, match=r"cannot write .*a\."):
        draw(path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", [None, 5, b"a.png", "", "a\0.png", sys.stdout])
@pytest.mark.parametrize(
    "draw",
    [
        lambda path: ccp.plot_coords(patched(), path, X),
        lambda path: draw_influence(Bars(["a"], [0.5], None, [], ""), path),
        lambda path: draw_ranking([], path),
        lambda path: draw_bench(None, path),  # type: ignore[arg-type]  # not looked at
    ],
    ids=["maps", "influence", "ranking", "bench"],
)
def test_what_is_not_a_file_name_is_refused(draw: Callable[[Any], None], path: Any) -> None:
    with pytest.raises(ArgumentError, match=r"path=.*write a file name"):
        draw(path)


def test_names_of_any_length_have_short_messages(tmp_path: Path) -> None:
    for name in ("n" * 100_000, "n" * 100_000 + ".png"):
        with pytest.raises(ArgumentError) as caught:
            ccp.plot_coords(patched(), tmp_path / name, X)
        assert len(str(caught.value)) < 1200


def test_a_picture_too_large_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot draw .*a\.png: .*too large"):
        write_figure(Figure(figsize=(1e6, 1), dpi=100), tmp_path / "a.png", ExportError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [10**30, 257, 0, True, 2.0])
def test_the_number_of_maps_is_limited(channels: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"channels=.*write how many to show, 1 to 256"):
        ccp.plot_coords(patched(), tmp_path / "a.png", X, channels=channels)
