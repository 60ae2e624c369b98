"""Handwritten digits by flow matching, drawn in four steps with classifier-free guidance, on a CPU.

    pip install scikit-learn
    python examples/flow.py            # a minute
    python examples/flow.py --quick    # ten seconds

The network learns the velocity n - x0 of straight paths from digits to noise (Lipman et al. 2022; Liu et al. 2022), at
times that are logit-normal (Esser et al. 2024). A sample follows it back in four steps of Euler, or two of Heun, which
ask the network as often. A classifier that has seen real digits says how many it recognises.
(`examples/meanflow.py` makes them in one step, and measures how far their distribution is from the real one.)
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

NO_LABEL = 10


class Network(nn.Module):
    """Predicts the velocity of images [B, 1, 8, 8] at times [B], for labels [B]; ``NO_LABEL`` is none."""

    def __init__(self, width: int = 256, blocks: int = 3):
        super().__init__()
        self.into, self.out = nn.Linear(64, width), nn.Linear(width, 64)
        self.time, self.label = nn.Linear(16, width), nn.Embedding(NO_LABEL + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angles = t.float()[:, None] * 2.0 ** torch.arange(8)
        told = self.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.label(label)
        h = self.into(x.flatten(1))
        for block in self.blocks:
            h = h + block(h + told)
        return self.out(nn.functional.silu(h)).view_as(x)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, then sample: the numbers that are printed."""
    options = parser().parse_args(argv)
    steps = options.steps or (600 if options.quick else 5000)
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    data, network = digits(), Network()
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", timesteps="logit_normal")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    losses, start = [], time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(len(data.images), (options.batch,), generator=generator)
        label, _ = fastdiff.drop_condition(data.labels[chosen], 0.1, NO_LABEL, generator=generator)
        noised = objective.noise(data.images[chosen], generator=generator)
        loss = objective.loss(network(noised.x_t, noised.model_time, label), noised)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
        losses.append(loss.detach())
    seconds = time.perf_counter() - start

    labels = torch.arange(1000) % 10
    classifier = train_classifier(data.images, data.labels)
    found = {
        "first loss": torch.stack(losses[: steps // 10]).mean().item(),
        "last loss": torch.stack(losses[-steps // 10 :]).mean().item(),
        "held out": classifier.held_out_accuracy,
    }
    print(f"{steps} steps of training in {seconds:.0f} s")
    for sampler, count in (("flow_euler", 4), ("flow_heun", 2)):
        made = objective.sample(
            averaged, (1000, 1, 8, 8), sampler, count, cond=labels, uncond=torch.full_like(labels, NO_LABEL),
            guidance=options.guidance, seed=options.seed, progress=False,
        )  # fmt: skip
        share = (classifier.recognise(made) == labels).float().mean().item()
        found[f"{sampler}, {count}"] = share
        print(f"{count} steps of {sampler}: {share:.1%} of {len(made)} digits recognised")
    print(f"recognised, of real digits that the classifier had not seen: {found['held out']:.1%}")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, help="of training; 5,000, and 600 with --quick")
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--guidance", type=float, default=1.5)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="less training")
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a network more threads are slower
    main()
