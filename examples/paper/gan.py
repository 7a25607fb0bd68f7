"""Generative adversarial network of a coloured shape: does it slide along an interpolation?

    python examples/paper/gan.py --seeds 3

A plain DCGAN, and the same with every convolution of the generator and of the discriminator
patched by ``ccp.patch(net, "all")``, learn pictures of an orange square, one for each position. The
settings differ in the generator, see :mod:`generative`; ``deconv`` is that of Radford et al. 2016.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from coloured_shapes import ABSENT, ShapeSet, presence, squares, stencils
from experiment import Options, Record, Run, Stopwatch, count_parameters, parse_options
from generative import (
    COMPARED,
    FILMS,
    FRAMES,
    compare,
    draw_films,
    draw_shares,
    kept_films,
    sliding_headline,
    square_movement,
)
from interpolation import coverage, spherical
from tile import Tile
from torch import Tensor, nn
from tqdm import tqdm
from variants import as_variant, coordinate_size

LATENTS = 16
PICTURES = 1_000
BATCH = 32
PENALTY_EVERY = 8
"""Steps between gradient penalties, each weighted so much more (Karras et al. 2020)."""
PENALTY = 2.0
"""Weight of half the squared gradient at real pictures (Mescheder et al. 2018, R1)."""
LONGER = 10
"""The deconv nets, whose squares are not whole yet, train so many times longer as well."""
LONG = "deconv, longer"


def generator(setting: str, width: int = 8) -> nn.Module:
    """From latents ``(N, 16)`` to logits of pictures ``(N, 3, 32, 32)``.

    Args:
        setting: ``"deconv"`` or ``"tiled"``, see :mod:`generative`.
        width: Channels at the finest scale.
    """
    if setting == "deconv":
        return nn.Sequential(
            *(nn.Linear(LATENTS, 4 * width * 16), nn.Unflatten(1, (4 * width, 4, 4))),
            *(nn.BatchNorm2d(4 * width), nn.ReLU()),
            *(nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width)),
            *(nn.ReLU(), nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width)),
            *(nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1)),
        )
    return nn.Sequential(
        *(Tile(16), nn.Conv2d(LATENTS, 2 * width, 1), nn.BatchNorm2d(2 * width)),
        *(nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 1), nn.BatchNorm2d(2 * width)),
        *(nn.ReLU(), nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width)),
        *(nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1)),
    )


def discriminator(width: int = 8) -> nn.Module:
    """From pictures ``(N, 3, 32, 32)`` to logits ``(N, 1)``: real, or generated."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(4 * width * 16, 1)),
    )


def gradient_penalty(critic: nn.Module, pictures: Tensor) -> Tensor:
    """Half the mean squared norm of the logit's gradient at real pictures ``(N, 3, H, W)``."""
    pictures = pictures.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(pictures).sum(), pictures, create_graph=True)
    return 0.5 * gradient.square().sum((1, 2, 3)).mean()


class Game:
    """The two nets, and the steps they take against each other (Goodfellow et al. 2014).

    Args:
        setting: Of the generator.
        variant: ``"plain"``, ``"patched"`` or ``"scrambled"``; of both nets.
        steps: How many there will be; learning rates fall to 0 over the second half.
    """

    def __init__(self, setting: str, variant: str, steps: int) -> None:
        self.painter = as_variant(generator(setting), variant)
        self.critic = as_variant(discriminator(), variant)
        self.optimizers = [
            torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.0, 0.99))
            for net in (self.painter, self.critic)
        ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / steps))
            for optimizer in self.optimizers
        ]
        # Interpolations are drawn by an average over the steps, as is usual: less noise.
        decay = 1 - min(0.1, 10 / steps)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.painter,
            multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay),
            use_buffers=True,
        )

    def step(self, real: Tensor, penalised: bool) -> tuple[float, float]:
        """One step of each net on real pictures ``(N, 3, 32, 32)``; the losses of both."""
        painting, judging = self.optimizers
        painted = self.painter(torch.randn(len(real), LATENTS)).sigmoid()
        critic_loss = (
            F.softplus(self.critic(painted.detach())).mean() + F.softplus(-self.critic(real)).mean()
        )
        if penalised:
            penalty = gradient_penalty(self.critic, real)
            (critic_loss + PENALTY * PENALTY_EVERY * penalty).backward()
        else:
            critic_loss.backward()
        judging.step()
        judging.zero_grad()
        painter_loss = F.softplus(-self.critic(painted)).mean()
        painter_loss.backward()
        painting.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        self.average.update_parameters(self.painter)
        return painter_loss.item(), critic_loss.item()

    @torch.no_grad()
    def paint(self, latents: Tensor) -> Tensor:
        """Pictures ``(N, 3, 32, 32)``, 0 to 1, by the averaged generator."""
        self.average.eval()
        pictures = [self.average(part).sigmoid() for part in latents.split(256)]
        self.average.train()
        return torch.cat(pictures)


def train(setting: str, variant: str, options: Options, longer: int = 1) -> Run:
    """Train one pair of nets and measure the generator's pictures and films.

    Args:
        setting: Of the generator.
        variant: Of both nets.
        options: Lengths of training among them.
        longer: Factor on the number of steps.
    """
    training, _ = squares()
    steps = options.length(3_600 * longer, 25)
    game = Game(setting, variant, steps)
    curves: dict[str, list[float]] = {"step": [], "generator": [], "discriminator": []}
    point = max(1, steps // 25)
    losses = torch.zeros(2)
    stopwatch = Stopwatch()
    for step in tqdm(range(1, steps + 1), desc=f"{setting}, {variant}", disable=None):
        with stopwatch:
            real = training[torch.randint(len(training), (BATCH,))]
            losses += torch.tensor(game.step(real, penalised=step % PENALTY_EVERY == 1))
        if step % point == 0:
            painter_loss, critic_loss = (losses / point).tolist()
            curves["step"].append(step)
            curves["generator"].append(round(painter_loss, 3))
            curves["discriminator"].append(round(critic_loss, 3))
            losses.zero_()
    pictures = game.paint(torch.randn(PICTURES, LATENTS))
    ends = torch.randn(FILMS + 1, LATENTS)
    latents = [spherical(ends[i], ends[i + 1], FRAMES) for i in range(FILMS)]
    films = game.paint(torch.cat(latents)).unflatten(0, (FILMS, FRAMES))
    return Run(
        parameters=count_parameters(game.painter) + count_parameters(game.critic),
        steps=steps,
        cpu_seconds=stopwatch.seconds,
        metrics={
            **coverage(presence(pictures)[:, :1], stencils()[:1]).metrics(),
            **square_movement(films).metrics(),
            "generator_coordinate_size": coordinate_size(game.painter),
            "discriminator_coordinate_size": coordinate_size(game.critic),
        },
        curves=curves,
        extra=kept_films(films),
    )


def real_pictures() -> Run:
    """What coverage and entropy are at best: those of as many real pictures."""
    places = torch.randint(ABSENT, (PICTURES,))
    pictures = ShapeSet(torch.stack([places, torch.full_like(places, ABSENT)], 1))
    shown = presence(pictures[torch.arange(PICTURES)])[:, :1]
    return Run(0, 0, 0.0, coverage(shown, stencils()[:1]).metrics())


def draw_picture(record: Record) -> None:
    """Film strips of the first seed above, figures of all seeds below."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 8.2), layout="constrained")
    grid = figure.add_gridspec(len(COMPARED) + 1, 3, height_ratios=[1] * len(COMPARED) + [3.6])
    films = [figure.add_subplot(grid[row, :]) for row in range(len(COMPARED))]
    draw_films(films, record)
    panels = (
        ("sliding_films", "Films in which the square slides"),
        ("intact", "Pictures of one whole square"),
        ("coverage", "Part of all positions painted"),
    )
    for column, (metric, title) in enumerate(panels):
        draw_shares(figure.add_subplot(grid[-1, column]), record, metric, title)
    figure.suptitle(sliding_headline(record, "GAN"), fontsize=14)
    figure.savefig(record.path.with_suffix(".png"), dpi=90)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> Record:
    """Run the experiment; returns its record."""
    options = parse_options(__doc__, arguments)
    record = Record("gan", options)
    record.run("reference", "real", 0, real_pictures)
    compare(record, train)
    if not options.quick:
        for seed in options.seeds:
            for variant in ("plain", "patched"):
                much = partial(train, "deconv", variant, options, longer=LONGER)
                record.run(LONG, variant, seed, much)
    record.print_table()
    draw_picture(record)
    return record


if __name__ == "__main__":
    main()
