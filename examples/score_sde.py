"""A score-based model of a mixture of Gaussians in the plane, trained in continuous time, and its likelihood.

    python examples/score_sde.py                                       # a minute on a CPU
    python examples/score_sde.py --quick                               # ten seconds
    python examples/score_sde.py --sde sub-vp --weighting importance

The density of the data is known here. So the negative log-likelihood of the network, by the probability-flow ODE, can
be compared with the best that there is, the entropy of the data. The difference is the Kullback-Leibler divergence.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import fastdiff

SDES = {"vp": fastdiff.VPSDE(t_min=1e-5), "sub-vp": fastdiff.SubVPSDE(t_min=1e-5)}
# The weights of the error of the score, whatever the network predicts.
WEIGHTINGS = {
    "sigma2": {"error_space": "epsilon"},  # sigma(t)^2
    "likelihood": {"weighting": "likelihood"},  # g(t)^2
    "importance": {
        "error_space": "epsilon",
        "timesteps": fastdiff.timesteps.UniformLogSNR(),
    },  # g(t)^2, with less variance
}


class Mixture:
    """Five Gaussians on a circle."""

    std, radius = 0.4, 2.0

    def __init__(self):
        angles = torch.arange(5) * (2 * math.pi / 5)
        self.means = self.radius * torch.stack([angles.cos(), angles.sin()], -1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, 2]"""
        chosen = torch.randint(5, (count,), generator=generator)
        return self.means[chosen] + self.std * torch.randn(count, 2, generator=generator)

    def log_density(self, x: Tensor) -> Tensor:
        """log p of points [count, 2]: [count]"""
        squares = (x[:, None] - self.means).square().sum(-1) / self.std**2
        return torch.logsumexp(-squares / 2, 1) - math.log(5 * 2 * math.pi * self.std**2)


class Network(nn.Module):
    """Predicts v, which determines the score at every t: ``objective.convert(v, noised, "score")``."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.to(x.dtype)[:, None] * 2.0 ** torch.arange(4, device=x.device)
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], -1))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, then compare: the numbers that are printed."""
    options = parser().parse_args(argv)
    steps = options.steps or (1500 if options.quick else 10_000)
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    data, network = Mixture(), Network()
    objective = fastdiff.Objective(SDES[options.sde], "v_prediction", **WEIGHTINGS[options.weighting])
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    losses = []
    for step in range(1, steps + 1):
        noised = objective.noise(data.draw(options.batch, generator), generator=generator)
        loss = objective.loss(network(noised.model_input, noised.model_time), noised)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % max(steps // 5, 1) == 0:
            print(f"step {step}: loss {torch.stack(losses[-steps // 5 :]).mean().item():.4f}")

    count = 500 if options.quick else 2000
    held_out = data.draw(count, generator)
    likelihood = fastdiff.log_likelihood(network, held_out, objective, steps=50, trace="exact")
    samples = objective.sample(network, (count, 2), "ddpm", 200, seed=options.seed, progress=False)
    found = {
        "nll": -likelihood.mean().item(),
        "entropy": -data.log_density(held_out).mean().item(),
        "samples": -data.log_density(samples).mean().item(),
        "first loss": torch.stack(losses[: steps // 10]).mean().item(),
        "last loss": torch.stack(losses[-steps // 10 :]).mean().item(),
    }
    bits = fastdiff.to_bits_per_dim(likelihood, 2).mean().item()
    print(f"held-out data under the model: {found['nll']:.3f} nats ({bits:.3f} bits per dimension)")
    print(f"the same under its own density: {found['entropy']:.3f} nats")
    print(f"samples under that density: {found['samples']:.3f} nats")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sde", choices=list(SDES), default="vp")
    made.add_argument("--weighting", choices=list(WEIGHTINGS), default="sigma2")
    made.add_argument("--steps", type=int, help="of training; 10,000, and 1,500 with --quick")
    made.add_argument("--batch", type=int, default=256)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="less training, fewer points")
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a network more threads are slower
    main()
