"""Handwritten digits with a perceptual and an adversarial loss on the x0 estimate, on a CPU.

    pip install scikit-learn
    python examples/features.py            # a minute or two
    python examples/features.py --quick    # ten seconds

Two networks learn a flow for the same steps, from the same noise: one on the squared error of the velocity alone, one
on that and two terms that look at its estimate of the digit: the LPIPS distance (Zhang et al. 2018) in the features of
a small classifier, and a discriminator's judgement. Where there is much noise, the squared error asks for the mean of
all digits that it could be, which is blurred; the terms ask for one that looks like a digit.

Then both estimate digits that neither has seen, out of 80% noise. How far are the estimates from the true digits, in
pixels and in features, and how sharp are they? (1: as sharp as real digits.)
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff import losses
from fastdiff.demo.data import digits
from fastdiff.losses import adversarial, features

LEVEL = 0.8  # the share of noise in what the digits are estimated from


class Network(nn.Module):
    """Predicts the velocity of images [B, 1, 8, 8] at times [B]."""

    def __init__(self, width: int = 256, blocks: int = 3):
        super().__init__()
        self.into, self.out = nn.Linear(64, width), nn.Linear(width, 64)
        self.time = nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * 2.0 ** torch.arange(8)
        told = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        h = self.into(x.flatten(1))
        for block in self.blocks:
            h = h + block(h + told)
        return self.out(F.silu(h)).view_as(x)


def classifier(images: Tensor, labels: Tensor, steps: int) -> nn.Sequential:
    """A network that tells digits apart, whose outputs 1 and 3 are features: [B, 16, 8, 8] and [B, 32, 4, 4]."""
    made = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(made.parameters(), 2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (128,))
        loss = F.cross_entropy(made(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.eval()


def train(total: losses.Sum, images: Tensor, options: argparse.Namespace, critic=None) -> tuple[Network, dict]:
    """(the network, the values of each term, averaged over the first and the last tenth of the steps)"""
    torch.manual_seed(options.seed)
    network, values = Network(), []
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        x0 = images[torch.randint(len(images), (options.batch,), generator=generator)]
        noised = total.objective.noise(x0, generator=generator)
        loss = total(network(noised.x_t, noised.model_time), noised, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        of_step = dict(total.values)
        if critic is not None and "adversarial" in of_step:
            of_step |= critic.step(x0)
        values.append(of_step)
    tenth = max(1, options.steps // 10)
    return network.eval(), {"first": averages(values[:tenth]), "last": averages(values[-tenth:])}


def averages(values: list[dict[str, Tensor]]) -> dict[str, float]:
    names = {name: None for each in values for name in each}
    return {name: torch.stack([each[name] for each in values if name in each]).mean().item() for name in names}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train both, then compare: the numbers that are printed."""
    options = parser().parse_args(argv)
    options.steps = options.steps or (400 if options.quick else 2000)
    torch.manual_seed(options.seed)
    data = digits()
    held_out = torch.arange(len(data.images)) % 7 == 0
    images, unseen = data.images[~held_out], data.images[held_out]
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")

    extractor = classifier(images, data.labels[~held_out], 300)
    perceptual = features.Perceptual(extractor, layers=[1, 3])
    judge = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(1024, 1),
    )  # fmt: skip
    critic = adversarial.Discriminator(
        judge, torch.optim.Adam(judge.parameters(), 5e-4, (0.0, 0.99)), r1_gamma=1.0, r1_every=4
    )
    plain = losses.Sum(objective)
    total = losses.Sum(
        objective,
        perceptual=losses.Term(perceptual, 3.0),
        # Once there is something to judge.
        adversarial=losses.Term(critic, lambda step: 0.05 * (step >= options.steps // 4)),
    )

    found = {}
    for name, summed in (("the squared error", plain), ("with the terms", total)):
        start = time.perf_counter()
        network, values = train(summed, images, options, critic)
        print(f"{name}: {options.steps} steps in {time.perf_counter() - start:.0f} s")
        for term, last in values["last"].items():
            first = values["first"].get(term)
            print(f"  {term}: {last:.4f}" + ("" if first is None else f" (at first {first:.4f})"))
        with torch.no_grad():
            noised = objective.noise(unseen, torch.full((len(unseen),), LEVEL), seed=1)
            estimate = objective.predict_x0(network(noised.x_t, noised.model_time), noised)
            found |= {
                f"{name}: squared error": F.mse_loss(estimate, unseen).item(),
                f"{name}: perceptual": perceptual(estimate, unseen).mean().item(),
                f"{name}: sharpness": sharpness(estimate) / sharpness(unseen),
            }
        if "perceptual" in values["first"]:
            found |= {f"first {k}": v for k, v in values["first"].items()}
            found |= {f"last {k}": v for k, v in values["last"].items()}
        for what in ("squared error", "perceptual", "sharpness"):
            print(f"  unseen digits, {what}: {found[f'{name}: {what}']:.4f}")
    return found


def sharpness(images: Tensor) -> float:
    """The mean square of the difference of neighbours."""
    return (images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()).item()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, help="of training; 2,000, and 400 with --quick")
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="less training")
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a network more threads are slower
    main()
