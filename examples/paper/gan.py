"""Generative adversarial network of coloured shapes: do objects slide along an interpolation?

    python examples/paper/gan.py --seeds 2

A plain DCGAN, and the same with every convolution of the generator and of the discriminator
patched by ``ccp.patch(net, "all")``, learn pictures of an orange square and a blue disc. The
settings differ in the generator, as in ``vae.py``:

- ``deconv``: a fully connected layer draws the first 4 x 4 map (Radford et al. 2016);
- ``tiled``: the latent is repeated over a 16 x 16 map, so that positions can come from
  coordinates alone, or leak in through zero padding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from coloured_shapes import ShapeSet, presence, squares_and_discs, stencils
from experiment import Options, Record, Run, Stopwatch, count_parameters, parse_options
from film_strips import draw, from_text, to_text
from interpolation import coverage, movement, spherical
from torch import Tensor, nn
from tqdm import tqdm
from vae import Tile
from variants import as_variant, coordinate_size

LATENTS = 16
FRAMES = 33
FILMS = 64
BATCH = 32
PENALTY_EVERY = 8
"""Steps between gradient penalties, each weighted so much more (Karras et al. 2020)."""
PENALTY = 1.0
"""Weight of half the squared gradient at real pictures (Mescheder et al. 2018, R1)."""


def generator(setting: str, width: int = 8) -> nn.Module:
    """From latents ``(N, 16)`` to logits of pictures ``(N, 3, 32, 32)``.

    Args:
        setting: ``"deconv"`` or ``"tiled"``, see the script's docstring.
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
