"""A variational autoencoder of handwritten digits, and a flow in its latents.

    python examples/vae.py                 # a minute or two on a CPU
    python examples/vae.py --quick         # ten seconds, too short to learn much
    python examples/vae.py --out vae.png   # with a picture: digits, what they are decoded to, and samples

The autoencoder, [1, 8, 8] to [4, 2, 2], is trained on a Gaussian likelihood whose variance is learned, and on the
divergence of its latents with free bits. Then a small network is trained on the latents, which are drawn and noised in
one pass over the encoder's moments, and sampled; the decoder makes digits of the samples.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import fastdiff

CHANNELS = 4  # of the latents


def autoencoder(width: int = 32) -> tuple[nn.Module, nn.Module]:
    """(encoder: [B, 1, 8, 8] -> moments [B, 8, 2, 2]; decoder: [B, 4, 2, 2] -> [B, 1, 8, 8])"""
    encoder = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.SiLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),
        nn.Conv2d(2 * width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),
        nn.Conv2d(2 * width, 2 * CHANNELS, 1),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Conv2d(CHANNELS, 2 * width, 1), nn.SiLU(),
        nn.ConvTranspose2d(2 * width, 2 * width, 4, stride=2, padding=1), nn.SiLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1), nn.SiLU(),
        nn.Conv2d(width, 1, 3, padding=1),
    )  # fmt: skip
    return encoder, decoder


class Flow(nn.Module):
    """A velocity of latents, told the time."""

    def __init__(self, width: int = 256):
        super().__init__()
        size = CHANNELS * 4
        self.layers = nn.Sequential(
            nn.Linear(size + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, 4, 2, 2], [B] -> [B, 4, 2, 2]"""
        angles = t.to(x.dtype)[:, None] * math.pi * 2.0 ** torch.arange(8, device=x.device)
        told = torch.cat([x.flatten(1), angles.sin(), angles.cos()], 1)
        return self.layers(told).view_as(x)


def digits() -> tuple[Tensor, Tensor]:
    """(to learn from, to be asked about): [N, 1, 8, 8] in [-1, 1]"""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    held_out = torch.arange(len(images)) % 7 == 0
    return images[~held_out], images[held_out]


def batches(images: Tensor, steps: int, size: int, seed: int):
    """(step, a batch of images drawn at random)"""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        yield step, images[torch.randint(len(images), (size,), generator=generator)]


def train_autoencoder(images: Tensor, options) -> tuple[nn.Module, nn.Module, fastdiff.AutoencoderLoss]:
    encoder, decoder = autoencoder()
    loss_of = fastdiff.AutoencoderLoss("likelihood", beta=options.beta, free_bits=0.5)
    learned = [*encoder.parameters(), *decoder.parameters(), *loss_of.parameters()]
    optimizer = torch.optim.Adam(learned, lr=2e-3)
    for step, x in batches(images, options.steps, options.batch, options.seed):
        moments = encoder(x)
        z = fastdiff.autoencoder.latents(moments, seed=options.seed, sample_offset=step * options.batch)
        loss = loss_of(decoder(z), x, moments)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval(), decoder.eval(), loss_of


def train_flow(encoder: nn.Module, images: Tensor, options) -> tuple[nn.Module, fastdiff.Objective, dict[str, Tensor]]:
    with torch.no_grad():
        mean, _ = encoder(images).chunk(2, 1)
    placing = {"shift": mean.mean((0, 2, 3)), "scale": 1 / mean.std((0, 2, 3)).clamp(min=1e-3)}  # latents of size 1
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", timesteps="logit_normal")
    network = Flow()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step, x in batches(images, 2 * options.steps, options.batch, options.seed + 1):
        with torch.no_grad():
            moments = encoder(x)
        noised = fastdiff.autoencoder.noise_latents(
            objective, moments, **placing, seed=options.seed, sample_offset=step * options.batch
        )
        loss = objective.loss(network(noised.model_input, noised.model_time), noised)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval(), objective, placing


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train both; returns what they reach on digits that neither has seen."""
    options = parser().parse_args(argv)
    if options.quick:
        options.steps = 200
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    images, unseen = digits()
    encoder, decoder, loss_of = train_autoencoder(images, options)
    network, objective, placing = train_flow(encoder, images, options)
    with torch.no_grad():
        moments = encoder(unseen)
        decoded = decoder(moments.chunk(2, 1)[0])
        divergence = fastdiff.ops.kl_normal(moments) * moments[0].numel() / 2
        z = objective.sample(network, (64, CHANNELS, 2, 2), "flow_euler", 20, seed=options.seed, progress=False)
        samples = decoder(z / placing["scale"].view(1, -1, 1, 1) + placing["shift"].view(1, -1, 1, 1))
        found = {
            "error": (decoded - unseen).square().mean().item(),
            "variance": loss_of.log_variance.exp().item(),
            "divergence": divergence.item(),
            "nearest": (samples.flatten(1)[:, None] - unseen.flatten(1)).square().mean(2).amin(1).mean().item(),
        }
    print(f"digits not seen: mean squared error {found['error']:.4f} (the learned variance: {found['variance']:.4f})")
    print(f"divergence of the latents: {found['divergence']:.1f} nats a digit")
    print(f"samples of the flow: {found['nearest']:.3f} from the nearest of these digits, mean squared")
    if options.out:
        picture(options.out, [unseen[:64], decoded[:64], samples])
    return found


def picture(path: str, columns: list[Tensor]) -> None:
    """8 x 8 images of each column, side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tiles = [c.view(8, 8, 8, 8).permute(0, 2, 1, 3).reshape(64, 64).clamp(-1, 1) for c in columns]
    pyplot.imsave(path, torch.cat(tiles, 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="a picture, PNG")
    parser.add_argument("--quick", action="store_true")
    return parser


if __name__ == "__main__":
    main()
