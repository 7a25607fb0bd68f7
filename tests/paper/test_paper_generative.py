"""The paper's generative models: the drawings, the measures, and the scripts."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PAPER = Path(__file__).parents[2] / "examples" / "paper"
sys.path.insert(0, str(PAPER))  # the scripts import their neighbours

shapes: Any = importlib.import_module("coloured_shapes")
film_strips: Any = importlib.import_module("film_strips")
interpolation: Any = importlib.import_module("interpolation")
variants: Any = importlib.import_module("variants")
gan: Any = importlib.import_module("gan")
vae: Any = importlib.import_module("vae")

FRAMES = 32  # so that no frame of a cross-fade lies on a threshold

torch.set_num_threads(1)  # as the scripts do: small nets lose by more


def place(x: int, y: int) -> int:
    """The place number of a centre (x, y) in pixels."""
    return (y - shapes.RADIUS) * shapes.PLACES + x - shapes.RADIUS


START = torch.tensor([place(5, 6), place(26, 25)])
END = torch.tensor([place(25, 20), place(4, 9)])


def measured(*films: Tensor) -> Any:
    return interpolation.movement(shapes.presence(torch.stack(films)), shapes.stencils())


def test_square_and_disc_are_where_they_are_said_to_be() -> None:
    (picture,) = shapes.ShapeSet(START[None])[torch.tensor([0])]
    assert picture.shape == (3, 32, 32)
    square = torch.zeros(32, 32)
    square[6 - 3 : 6 + 4, 5 - 3 : 5 + 4] = 1
    assert torch.equal(picture[0], square)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disc = picture[2]
    assert torch.isclose((disc * columns).sum() / disc.sum(), torch.tensor(26.0))
    assert torch.isclose((disc * rows).sum() / disc.sum(), torch.tensor(25.0))
    assert disc.sum().item() == pytest.approx(torch.pi * 3.5**2, rel=0.01)


def test_overlapping_objects_add_up_and_absent_ones_leave_no_light() -> None:
    both = torch.tensor([[place(9, 9), place(10, 9)], [place(9, 9), shapes.ABSENT]])
    overlapping, alone = shapes.ShapeSet(both)[torch.tensor([0, 1])]
    assert torch.equal(overlapping[0], alone[0])
    assert overlapping[2].sum() > 30
    assert alone[2].sum() == 0


def test_no_test_picture_is_trained_on() -> None:
    training, test = shapes.squares()
    trained, held_out = (set(part.places[:, 0].tolist()) for part in (training, test))
    assert len(trained) == len(training)
    assert len(held_out) == len(test)
    assert not trained & held_out
    assert len(training) + len(test) == 26 * 26


def test_positions_find_every_object() -> None:
    test = shapes.ShapeSet(torch.randint(shapes.ABSENT, (200, 2)))
    pictures = test[torch.arange(200)]
    found, match = interpolation.positions(shapes.presence(pictures), shapes.stencils())
    assert torch.equal(found, shapes.centres(test.places))
    assert torch.allclose(match, torch.ones(200, 2))


def test_a_sliding_film_slides() -> None:
    film = measured(shapes.sliding(START, END, FRAMES), shapes.sliding(END, START, FRAMES))
    assert film.sliding_films == 1
    assert film.teleports == film.teleporting_films == film.faded == 0
    assert 0.5 < film.longest_step < 2


def test_a_cross_fade_teleports_once_and_is_faded_half_of_the_time() -> None:
    film = measured(shapes.cross_fade(START, END, FRAMES))
    assert film.sliding_films == 0
    assert film.teleports == pytest.approx(1 / (FRAMES - 1))
    assert film.teleporting_films == 1
    # The square moves by (20, 14) pixels, the disc by (-22, -16).
    assert film.longest_step == pytest.approx(
        (20**2 + 14**2) ** 0.5 / 2 + (22**2 + 16**2) ** 0.5 / 2
    )
    assert film.faded == pytest.approx(16 / FRAMES)  # k of 31 parts new, 8 <= k <= 23
    assert film.half_intensity > 0.4


def test_an_object_that_vanishes_on_its_way_teleports() -> None:
    film = shapes.sliding(START, END, FRAMES)
    film[10:20] = 0
    gone = measured(film)
    assert gone.teleporting_films == 1
    assert gone.sliding_films == 0
    assert gone.faded == pytest.approx(10 / FRAMES)


def test_black_films_do_not_slide() -> None:
    black = measured(torch.zeros(FRAMES, 3, 32, 32))
    assert black.sliding_films == black.teleports == 0
    assert black.faded == 1


def test_coverage_of_all_positions_and_of_one() -> None:
    everywhere = torch.arange(shapes.ABSENT)
    full = shapes.ShapeSet(torch.stack([everywhere, everywhere.flip(0)], 1))[everywhere]
    spread = interpolation.coverage(shapes.presence(full), shapes.stencils())
    assert (spread.intact, spread.coverage) == (1, 1)
    assert spread.entropy == pytest.approx(1)
    same = interpolation.coverage(shapes.presence(full[:1].repeat(50, 1, 1, 1)), shapes.stencils())
    assert same.coverage == pytest.approx(1 / 13**2)
    assert same.entropy == 0
    halved = interpolation.coverage(shapes.presence(full / 2), shapes.stencils())
    assert halved.intact == 0


def test_spherical_interpolation_keeps_the_radius_and_the_ends() -> None:
    start, end = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    path = interpolation.spherical(start, end, 5)
    assert torch.allclose(path.norm(dim=1), torch.full((5,), 3.0))
    assert torch.allclose(path[[0, -1]], torch.stack([start, end]), atol=1e-6)
    assert torch.allclose(interpolation.spherical(start, start, 3), start.expand(3, 3))


def test_films_survive_the_record() -> None:
    film = shapes.sliding(START, END, 4)
    kept = film_strips.from_text(film_strips.to_text(film))
    assert kept.shape == film.shape
    assert (kept - film).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("variant", ["plain", "patched", "scrambled"])
def test_every_variant_starts_from_the_same_outputs(variant: str) -> None:
    torch.manual_seed(0)
    plain = vae.VAE("tiled").eval()
    model = variants.as_variant(plain, variant)
    latents = torch.randn(2, vae.LATENTS)
    assert torch.equal(model.decode(latents), plain.decode(latents))
    assert variants.coordinate_size(model) == 0


def test_only_coordinates_let_a_tiled_decoder_place_a_square() -> None:
    training, _ = shapes.squares()
    latents = torch.zeros(len(training), vae.LATENTS)
    latents[:, :2] = shapes.centres(training.places[:, 0]) / 16 - 1
    errors = {}
    for variant in ("plain", "patched", "scrambled"):
        torch.manual_seed(0)
        decoder = variants.as_variant(vae.VAE("tiled"), variant).decoder
        optimizer = torch.optim.Adam(decoder.parameters(), lr=4e-3)
        for _ in range(300):
            batch = torch.randint(len(training), (32,))
            logits, pictures = decoder(latents[batch]), training[batch]
            error = torch.nn.functional.binary_cross_entropy_with_logits(logits, pictures)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        errors[variant] = error.item()
    assert errors["patched"] < 0.5 * min(errors["plain"], errors["scrambled"]), errors


def recorded(name: str) -> dict[tuple[str, str], list[dict[str, float]]]:
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in json.loads((PAPER / "results" / f"{name}.json").read_text())["runs"]:
        runs.setdefault((run["setting"], run["variant"]), []).append(run["metrics"])
    return runs


def test_vae_quick_run_trains_coordinates_and_leaves_a_picture(tmp_path: Path) -> None:
    record = vae.main(["--quick", "--out", str(tmp_path)])
    for setting, variant in vae.COMPARED:
        (run,) = record.of(setting, variant)
        assert (run.metrics["coordinate_size"] > 0) == (variant != "plain")
        assert run.curves["loss"][-1] < run.curves["loss"][0]
    assert (tmp_path / "vae.png").stat().st_size > 10_000
    names = sorted(record.runs[-1].metrics)
    assert names == sorted(recorded("vae")["tiled", "patched"][0])


def test_gan_quick_run_trains_coordinates_and_leaves_a_picture(tmp_path: Path) -> None:
    record = gan.main(["--quick", "--out", str(tmp_path)])
    for setting, variant in gan.COMPARED:
        (run,) = record.of(setting, variant)
        for net in ("generator", "discriminator"):
            assert (run.metrics[f"{net}_coordinate_size"] > 0) == (variant != "plain")
    assert (tmp_path / "gan.png").stat().st_size > 10_000


def test_the_recorded_vae_slides_where_the_latent_is_tiled_only_with_coordinates() -> None:
    runs = recorded("vae")
    assert len(runs["tiled", "patched"]) == 3
    assert min(metrics["sliding_films"] for metrics in runs["tiled", "patched"]) > 0.9
    worst = max(metrics["loss"] for metrics in runs["tiled", "patched"])
    for control in ("plain", "scrambled"):
        assert max(metrics["sliding_films"] for metrics in runs["tiled", control]) < 0.2
        assert worst < min(metrics["loss"] for metrics in runs["tiled", control])


def test_the_recorded_gan_slides_where_the_latent_is_tiled_only_with_coordinates() -> None:
    runs = recorded("gan")
    assert len(runs["tiled", "patched"]) == 3
    assert min(metrics["sliding_films"] for metrics in runs["tiled", "patched"]) > 0.9
    for control in ("plain", "scrambled"):
        assert max(metrics["sliding_films"] for metrics in runs["tiled", control]) < 0.5
