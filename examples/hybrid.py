"""Handwritten digits with a learned variance, and their likelihood in bits per dimension.

    python examples/hybrid.py                 # some minutes on a CPU
    python examples/hybrid.py --quick         # ten seconds, too short to learn much

Two networks are trained for the same steps: one on the squared error alone (L_simple, a fixed variance), one on the
hybrid loss of Nichol and Dhariwal 2021, which teaches it the variance too. The variational bound of digits that neither
has seen is compared: over all 1,000 timesteps, and over 25 of them, where a good variance counts most.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fastdiff

BINS = 17  # the digits are whole numbers from 0 to 16


class Network(nn.Module):
    """Residual convolutions told the time; ``out`` channels."""

    def __init__(self, out: int, width: int = 48, blocks: int = 4):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.into, self.out = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, out, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1, padding_mode="zeros"),
                nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )  # fmt: skip
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, 1, 8, 8] -> [B, out, 8, 8]"""
        angles = t.float()[:, None] * 1000 ** (-torch.arange(16, device=t.device) / 15)
        h = self.into(x) + self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, :, None, None]
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


def digits() -> tuple[Tensor, Tensor]:
    """(to learn from, to be asked about): [N, 1, 8, 8] in [-1, 1]"""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    held_out = torch.arange(len(images)) % 7 == 0
    return images[~held_out], images[held_out]


def train(loss_of, network: nn.Module, objective: fastdiff.Objective, images: Tensor, options) -> nn.Module:
    """Returns the average of the weights over the last steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps, pct_start=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(min(0.995, 1 - 10 / options.steps))
    )
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        x0 = images[torch.randint(len(images), (options.batch,), generator=generator)]
        noised = objective.noise(x0, seed=options.seed * 10**6 + step)
        loss = loss_of(network(noised.x_t, noised.t), noised)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
    return average.module.eval()


def few_steps(process: fastdiff.VariancePreserving, steps: int) -> tuple[fastdiff.VariancePreserving, Tensor]:
    """(the process that visits ``steps`` of the timesteps, these timesteps)"""
    visited = torch.linspace(0, process.steps - 1, steps).round().long()
    alpha_bar = process.alpha_bar[visited]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return fastdiff.VariancePreserving(1 - alpha_bar / before), visited


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train both; returns the bits per dimension of each."""
    options = parser().parse_args(argv)
    if options.quick:
        options.steps, options.draws = 30, 2
    torch.set_num_threads(options.threads)
    images, unseen = digits()
    process = fastdiff.VariancePreserving("cosine")
    objective = fastdiff.Objective(process, "epsilon")
    bound = fastdiff.VariationalBound(objective, "learned_range", BINS)
    networks = {}
    for name, out, loss_of in (("simple", 1, objective.loss), ("hybrid", 2, bound.hybrid)):
        torch.manual_seed(options.seed)
        networks[name] = train(loss_of, Network(out), objective, images, options)
    coarse, visited = few_steps(process, 25)
    variances = {"simple": ("fixed_small", "fixed_large"), "hybrid": ("learned_range",)}
    found = {}
    for name, network in networks.items():
        for variance in variances[name]:
            how = {"variance": variance, "bins": BINS, "progress": False, "seed": options.seed}
            whole = fastdiff.bits_per_dim(network, unseen.split(256), process, draws=options.draws, **how)
            few = fastdiff.bits_per_dim(lambda x, t: network(x, visited[t]), unseen.split(256), coarse, **how)  # noqa: B023
            print(f"{name}, {variance}: {whole.total:.3f} bits/dim of 1,000 steps (+- {whole.error:.3f}), "
                  f"{few.total:.3f} of 25")  # fmt: skip
            found |= {f"{name} {variance}": whole.total, f"{name} {variance}, 25 steps": few.total}
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--draws", type=int, default=50, help="timesteps of the 1,000 drawn for each digit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    return parser


if __name__ == "__main__":
    main()
