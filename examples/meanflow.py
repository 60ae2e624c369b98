"""Handwritten digits in one step of a network: MeanFlow (Geng et al. 2025, arXiv 2505.13447) on a CPU.

    pip install scikit-learn
    python examples/meanflow.py            # a minute
    python examples/meanflow.py --quick    # ten seconds

The network u(x, r, t) is the mean velocity between the times r and t of a path from data to noise, so that
x_r = x_t - (t - r) u(x_t, r, t), in one step. It learns this from the velocity v = n - x0 alone: u = v - (t - r) du/dt,
where du/dt is the derivative along the path.

A classifier that has seen real digits says how many of the network's it recognises. It recognises the mean image of
each digit too, so the energy distance from real digits is measured as well: 0 for the same distribution.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastdiff
from fastdiff.demo.classifier import train_classifier
from fastdiff.demo.data import digits


class Network(nn.Module):
    """Predicts the mean velocity of images [B, 1, 8, 8] between times r and t [B], for labels [B]."""

    def __init__(self, width: int = 256, blocks: int = 3, classes: int = 10):
        super().__init__()
        self.into, self.out = nn.Linear(64, width), nn.Linear(width, 64)
        self.time, self.label = nn.Linear(16, width), nn.Embedding(classes, width)
        self.skip = nn.Linear(width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor, r: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angles = torch.stack([t, t - r], -1)[..., None] * 2.0 ** torch.arange(4)
        told = self.time(torch.cat([angles.sin(), angles.cos()], -1).flatten(1)) + self.label(label)
        h = self.into(x.flatten(1))
        for block in self.blocks:
            h = h + block(h + told)
        return (self.out(nn.functional.silu(h)) + self.skip(told) * x.flatten(1)).view_as(x)


def times(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(r, t) [count], r <= t, uniform; for half of them r = t, where the mean velocity is v. (The paper's times are
    logit-normal, which seldom come near t = 1, where a sample begins: that takes longer training.)"""
    r, t = torch.rand(2, count, generator=generator).sort(0).values
    return torch.where(torch.rand(count, generator=generator) < 0.5, t, r), t


def meanflow_loss(
    objective: fastdiff.Objective, network: nn.Module, x0: Tensor, label: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error without a gradient) of a batch."""
    r, t = times(len(x0), generator)
    noised = objective.noise(x0, t, generator=generator, with_target=True)
    tangents = noised.target, torch.zeros_like(r), torch.ones_like(t)
    u, du_dt = torch.func.jvp(lambda x, r, t: network(x, r, t, label), (noised.x_t, r, t), tangents)
    error = objective.loss(u, noised, y=du_dt.detach(), r=r - t, reduction="none")
    squares = error * x0[0].numel()
    return (squares / (squares.detach() + 1e-3)).mean(), error.detach().mean()


@torch.no_grad()
def sample(network: nn.Module, labels: Tensor, seed: int) -> Tensor:
    """One digit a label: [B, 1, 8, 8]"""
    noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return noise - network(noise, torch.zeros(len(labels)), torch.ones(len(labels)), labels)


def energy_distance(made: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of images a and b of one label, the mean over labels: 0 where both have the
    same distribution (Szekely, Rizzo 2013)."""

    def between(a: Tensor, b: Tensor) -> Tensor:  # of a set and itself: without each image's distance from itself
        return torch.cdist(a, b).sum() / (len(a) * (len(b) - (a is b)))

    pairs = [(made[labels == k].flatten(1), real[real_labels == k].flatten(1)) for k in real_labels.unique()]
    distances = [2 * between(a, b) - between(a, a) - between(b, b) for a, b in pairs]
    return torch.stack(distances).mean().item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, then sample: the numbers that are printed."""
    options = parser().parse_args(argv)
    steps = options.steps or (600 if options.quick else 3000)
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    data, network = digits(), Network()
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    losses, start = [], time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(data.images), (options.batch,), generator=generator)
        loss, error = meanflow_loss(objective, network, data.images[chosen], data.labels[chosen], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
        losses.append(error)
        if step % max(steps // 5, 1) == 0:
            print(f"step {step}: mean squared error {torch.stack(losses[-steps // 5 :]).mean().item():.4f}")
    seconds = time.perf_counter() - start

    labels = torch.arange(1000) % 10
    made = sample(averaged, labels, options.seed)
    means = torch.stack([data.images[data.labels == k].mean(0) for k in range(10)])
    classifier = train_classifier(data.images, data.labels)
    found = {
        "recognised": (classifier.recognise(made) == labels).float().mean().item(),
        "held out": classifier.held_out_accuracy,
        "distance": energy_distance(made, labels, data.images, data.labels),
        "distance of means": energy_distance(means[labels], labels, data.images, data.labels),
        "first error": torch.stack(losses[: steps // 10]).mean().item(),
        "last error": torch.stack(losses[-steps // 10 :]).mean().item(),
        "seconds": seconds,
    }
    print(f"{steps} steps of training in {seconds:.0f} s")
    print(f"recognised, of {len(made)} digits made in one step: {found['recognised']:.1%}")
    print(f"recognised, of real digits that the classifier had not seen: {found['held out']:.1%}")
    print(f"energy distance from real digits: {found['distance']:.2f} (mean images: {found['distance of means']:.2f})")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, help="of training; 3,000, and 600 with --quick")
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="less training")
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a network more threads are slower
    main()
