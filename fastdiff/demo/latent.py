"""The demo's autoencoder, and what a diffusion in its latents works on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff.autoencoder import latents

from . import DemoError
from .seeds import derived_seed, generator, with_weights_of
from .settings import Settings
from .unet import upsample

CHANNELS = 2  # of the latents
FACTOR = 2  # pixels a latent, along each side
WIDTH = 32
LEARNING_RATE = 2e-3
BETA, FREE_BITS = 0.1, 0.5
AT_ONCE = 4096  # images that are encoded in one call


def check(settings: Settings) -> None:
    """Raises DemoError for images of a size that the autoencoder does not take."""
    if settings.latent and settings.size % FACTOR:
        raise DemoError(f"--latent needs a --size that is a multiple of {FACTOR}; got {settings.size}.")


class Autoencoder(nn.Module):
    """A variational autoencoder of images [B, channels, H, W]. Its latents [B, CHANNELS, H / 2, W / 2] are shifted and
    scaled to the standard deviation that the process reckons with.

    ``encoder`` gives moments, the means and behind them the log-variances; ``decoder`` takes latents that are neither
    shifted nor scaled.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(2 * WIDTH, 2 * CHANNELS, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, 2 * WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1), nn.SiLU(),
            Upsample(),
            nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1), nn.SiLU(),
            nn.Conv2d(WIDTH, channels, 3, padding=1),
        )  # fmt: skip
        self.register_buffer("shift", torch.zeros(CHANNELS))
        self.register_buffer("scale", torch.ones(CHANNELS))

    def encode(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> latents, the means of their distributions."""
        return latents(self.encoder(images), shift=self.shift, scale=self.scale, sample=False)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, CHANNELS, H / 2, W / 2] -> images [B, channels, H, W]."""
        return self.decoder(latents / self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """[N, 2 CHANNELS, H / 2, W / 2] of images [N, channels, H, W]."""
        return torch.cat([self.encoder(part) for part in images.split(AT_ONCE)])

    @torch.no_grad()
    def report(self, images: Tensor) -> dict[str, float]:
        """Of images [N, channels, H, W]: the mean squared error of what the means of their latents are decoded to; and
        the divergence of the latents' distributions from the standard normal one, in nats an image."""
        moments = self.moments(images)
        mean = moments[:, :CHANNELS]
        decoded = torch.cat([self.decoder(part) for part in mean.split(AT_ONCE)])
        return {
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "squared_error": F.mse_loss(decoded, images).item(),
            "divergence": fastdiff.ops.kl_normal(moments).item() * mean[0].numel(),
        }


class Upsample(nn.Module):
    """``upsample`` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample(x)


def train_autoencoder(settings: Settings, images: Tensor, deviation: float) -> Autoencoder:
    """On images [N, C, H, W], for as many steps of as many images as the run has. The latents of all these images get
    this standard deviation, and the mean 0."""
    made = with_weights_of(settings.seed, "autoencoder", lambda: Autoencoder(images.shape[1])).to(images.device)
    loss_of = fastdiff.AutoencoderLoss("likelihood", beta=BETA, free_bits=FREE_BITS).to(images.device)
    optimizer = torch.optim.Adam([*made.parameters(), *loss_of.parameters()], LEARNING_RATE)
    order, seed = generator(settings.seed, "autoencoder"), derived_seed(settings.seed, "posterior")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        x = images[torch.randint(len(images), (settings.batch,), generator=order).to(images.device)]
        moments = made.encoder(x)
        z = latents(moments, seed=seed, sample_offset=step * settings.batch)
        loss = loss_of(made.decoder(z), x, moments)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    made.eval().requires_grad_(False)
    mean = made.moments(images)[:, :CHANNELS]
    made.shift.copy_(mean.mean((0, 2, 3)))
    made.scale.copy_(deviation / mean.std((0, 2, 3)).clamp(min=1e-3))
    return made
