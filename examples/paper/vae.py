"""Variational autoencoder of a coloured shape: does it slide along an interpolation, or fade?

    python examples/paper/vae.py --seeds 3

A plain encoder and decoder, and the same patched by ``ccp.patch(vae, "all")``, learn pictures of
an orange square, one for each position but those held out. Latents are then interpolated
between pictures. The settings differ in the decoder, see :mod:`generative`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from coloured_shapes import ShapeSet, centres, cross_fade, presence, sliding, squares, stencils
from experiment import Options, Record, Run, Stopwatch, count_parameters, parse_options
from generative import (
    COMPARED,
    FILMS,
    FRAMES,
    compare,
    draw_films,
    draw_shares,
    kept_films,
    label,
    sliding_headline,
    square_movement,
)
from interpolation import positions, straight
from palette import BY_VARIANT
from tile import Tile
from torch import Tensor, nn
from tqdm import tqdm
from variants import as_variant, coordinate_size

LATENTS = 8
"""Two would do: the square has two coordinates."""
BATCH = 32


class VAE(nn.Module):
    """Kingma and Welling 2014, https://arxiv.org/abs/1312.6114, with convolutions.

    Args:
        setting: ``"deconv"`` or ``"tiled"``, see :mod:`generative`.
        width: Channels at the finest scale.
    """

    def __init__(self, setting: str, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, width, 4, 2, 1), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU()),
            *(nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(4 * width * 16, 2 * LATENTS)),
        )
        if setting == "deconv":
            self.decoder = nn.Sequential(
                *(nn.Linear(LATENTS, 4 * width * 16), nn.Unflatten(1, (4 * width, 4, 4))),
                *(nn.ReLU(), nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1)),
                *(nn.ReLU(), nn.ConvTranspose2d(2 * width, width, 4, 2, 1)),
                *(nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1)),
            )
        else:
            self.decoder = nn.Sequential(
                *(Tile(16), nn.Conv2d(LATENTS, 4 * width, 1)),
                *(nn.ReLU(), nn.Conv2d(4 * width, 4 * width, 1)),
                *(nn.ReLU(), nn.Conv2d(4 * width, 2 * width, 3, padding=1)),
                *(nn.ReLU(), nn.ConvTranspose2d(2 * width, 3, 4, 2, 1)),
            )
        for module in self.decoder:
            if isinstance(module, nn.Conv2d):
                # torch's default shrinks the latent at each layer: nothing is learnt for long.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance ``(N, LATENTS)`` of the posterior of ``(N, 3, 32, 32)``."""
        mean, log_variance = self.encoder(pictures).chunk(2, 1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``(N, 3, 32, 32)``, 0 to 1, of latents ``(N, LATENTS)``."""
        return self.decoder(latents).sigmoid()

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(pictures)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(latents), mean, log_variance


def negative_elbo(vae: VAE, pictures: Tensor, divergence_weight: float = 1.0) -> Tensor:
    """Nats a picture: binary cross-entropy of all pixels, and the divergence from the prior."""
    logits, mean, log_variance = vae(pictures)
    error = F.binary_cross_entropy_with_logits(logits, pictures, reduction="sum")
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
    return (error + divergence_weight * divergence) / len(pictures)


@torch.no_grad()
def interpolate(vae: VAE, test: ShapeSet) -> Tensor:
    """Films ``(FILMS, FRAMES, 3, 32, 32)`` between the means of held-out pictures."""
    means, _ = vae.encode(test[torch.arange(FILMS + 1)])
    latents = [straight(means[i], means[i + 1], FRAMES) for i in range(FILMS)]
    return vae.decode(torch.cat(latents)).unflatten(0, (FILMS, FRAMES))


@torch.no_grad()
def reconstruction(vae: VAE, test: ShapeSet) -> dict[str, float]:
    """Errors on held-out pictures: mean square of pixel values, and pixels of the centre."""
    pictures = test[torch.arange(len(test))]
    decoded = vae.decode(vae.encode(pictures)[0])
    found, _ = positions(presence(decoded)[:, :1], stencils()[:1])
    distance = (found[:, 0] - centres(test.places[:, 0])).norm(dim=-1)
    return {
        "mse": F.mse_loss(decoded, pictures).item(),
        "centre_error": distance.mean().item(),
    }


def train(setting: str, variant: str, options: Options) -> Run:
    """Train one autoencoder and measure its films."""
    training, test = squares()
    vae = as_variant(VAE(setting), variant)
    steps = options.length(1_600, 25)
    # One rate for all weights, those of coordinates too: no variant is tuned more.
    optimizer = torch.optim.Adam(vae.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    held_out = test[torch.arange(len(test))]
    curves: dict[str, list[float]] = {"step": [], "loss": []}
    stopwatch = Stopwatch()
    for step in tqdm(range(steps), desc=f"{setting}, {variant}", disable=None):
        with stopwatch:
            pictures = training[torch.randint(len(training), (BATCH,))]
            # From free to full price, else the posterior collapses before anything is drawn.
            weight = min(1.0, 0.02 + 1.2 * step / steps)
            loss = negative_elbo(vae, pictures, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (step + 1) % math.ceil(steps / 25) == 0 or step + 1 == steps:
            with torch.no_grad():
                curves["loss"].append(round(negative_elbo(vae, held_out).item(), 2))
            curves["step"].append(step + 1)
    vae.eval()
    films = interpolate(vae, test)
    return Run(
        parameters=count_parameters(vae),
        steps=steps,
        cpu_seconds=stopwatch.seconds,
        metrics={
            "loss": curves["loss"][-1],
            **reconstruction(vae, test),
            **square_movement(films).metrics(),
            "coordinate_size": coordinate_size(vae),
        },
        curves=curves,
        extra=kept_films(films),
    )


def reference(kind: str) -> Run:
    """The scale's two ends: films that slide, or cross-fade, between the same pictures."""
    _, test = squares()
    make = sliding if kind == "sliding" else cross_fade
    films = torch.stack([make(*test.places[i : i + 2], FRAMES) for i in range(FILMS)])
    return Run(0, 0, 0.0, square_movement(films).metrics())


def draw_picture(record: Record) -> None:
    """Film strips of the first seed above, figures of all seeds below."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 9), layout="constrained")
    grid = figure.add_gridspec(len(COMPARED) + 1, 3, height_ratios=[1] * len(COMPARED) + [4])
    films = [figure.add_subplot(grid[row, :]) for row in range(len(COMPARED))]
    draw_films(films, record)
    loss, slides, faded = (figure.add_subplot(grid[-1, column]) for column in range(3))
    for compared in COMPARED:
        for run in record.of(*compared):
            name = label(compared) if run.seed == 0 else None
            curve = run.curves["step"], run.curves["loss"]
            dashes = "--" if compared[0] == "deconv" else "-"
            loss.plot(*curve, dashes, color=BY_VARIANT[compared[1]], label=name, lw=1.2)
    loss.set(
        title="Loss on held-out pictures", xlabel="step", ylabel="nats a picture", yscale="log"
    )
    loss.legend(fontsize=8)
    for axes, metric, title in (
        (slides, "sliding_films", "Films in which the square slides"),
        (faded, "faded", "Frames in which it is faded"),
    ):
        draw_shares(axes, record, metric, title)
        fade = 100 * record.mean("reference", "cross-fade", metric)
        axes.axvline(fade, color="black", ls=":", lw=1)
        side = "left" if fade < 50 else "right"
        axes.text(fade, -0.75, " a cross-fade ", ha=side, fontsize=8)
        axes.set_ylim(top=-1.1)
    figure.suptitle(sliding_headline(record, "VAE"), fontsize=14)
    figure.savefig(record.path.with_suffix(".png"), dpi=90)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> Record:
    """Run the experiment; returns its record."""
    options = parse_options(__doc__, arguments)
    record = Record("vae", options)
    for kind in ("sliding", "cross-fade"):
        record.run("reference", kind, 0, lambda kind=kind: reference(kind))
    compare(record, train)
    record.print_table()
    draw_picture(record)
    return record


if __name__ == "__main__":
    main()
