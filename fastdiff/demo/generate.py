"""Drawing images and videos from a trained network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import DemoError
from .latent import Autoencoder
from .settings import Recipe
from .unet import UNet

PIXELS_A_CALL = 2**17  # bounds the memory: 2048 digits, or 2 images of 256 x 256
FRAMES_A_CALL = 128  # of videos: with more, what the network remembers of them no longer fits the caches of a CPU


def draw(
    network: UNet,
    recipe: Recipe,
    labels: Tensor,
    steps: int,
    guidance: float,
    seed: int,
    autoencoder: Autoencoder | None = None,
    progress: bool = True,
    callback: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """One image or video for each of the labels [N]: float32 [N, C, H, W] or [N, C, F, H, W] on the CPU, in [-1, 1].

    Image i depends on the seed, i and its label alone. A network of latents has an autoencoder, which decodes what was
    drawn. ``callback`` is ``fastdiff.sample``'s.
    """
    device = next(network.parameters()).device
    size = network.settings["size"]
    frames = (network.settings["frames"],) if "frames" in network.settings else ()
    shape = network.settings["channels"], *frames, size, size
    chunk = max(1, FRAMES_A_CALL // frames[0] if frames else PIXELS_A_CALL // size**2)
    images = []
    for first in range(0, len(labels), chunk):
        condition = labels[first : first + chunk].to(device)
        try:
            part = recipe.objective.sample(
                network,
                (len(condition), *shape),
                recipe.sampler,
                steps,
                cond=condition,
                uncond=torch.full_like(condition, network.null_class),
                guidance=guidance,
                seed=seed,
                sample_offset=first,
                progress=progress,
                callback=callback,
            )
        except ValueError as error:
            raise DemoError(str(error)) from error
        images.append(_decoded(part, autoencoder).clamp(-1, 1).cpu())
    return torch.cat(images)


def trajectory(
    network: UNet,
    recipe: Recipe,
    labels: Tensor,
    steps: int,
    guidance: float,
    seed: int,
    autoencoder: Autoencoder | None = None,
    columns: int = 7,
) -> tuple[list[str], Tensor, Tensor]:
    """How images come about: titles of the columns, and x and the estimate of x0, each [columns, N, C, H, W]; of
    latents, what they are decoded to; of videos, their middle frames."""
    shown = sorted({round(k) for k in torch.linspace(0, steps - 1, columns).tolist()})
    titles, seen, estimates = [], [], []

    def record(step: int, t: Tensor, x: Tensor, x0: Tensor) -> None:
        if step in shown:
            time = f"{int(t)}" if recipe.process.discrete else f"{float(t):.2g}"
            titles.append(f"step {step + 1}\nt = {time}")
            for images, kept in ((x, seen), (x0, estimates)):
                images = _decoded(images, autoencoder).cpu()
                kept.append(images if images.ndim == 4 else images[:, :, images.shape[2] // 2])

    draw(network, recipe, labels, steps, guidance, seed, autoencoder, progress=False, callback=record)
    return titles, torch.stack(seen), torch.stack(estimates)


def _decoded(x: Tensor, autoencoder: Autoencoder | None) -> Tensor:
    return x if autoencoder is None else autoencoder.decode(x)
