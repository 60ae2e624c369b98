"""EDM with EDM2's learned uncertainty, on handwritten digits: every noise level counts alike in the loss.

pip install scikit-learn
python examples/edm2_uncertainty.py            # about a minute on 2 CPU cores; --quick: some seconds

It prints, for each of eight ranges of sigma, ln of the weighted error and the u that was learned beside the network:
they are equal where u has been found.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import timesteps, uncertainty, weighting

EDGES = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0]


class Network(nn.Module):
    """EDM's F: it is called with ``noised.model_input`` and ``noised.model_time``, which is c_noise."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.into, self.middle = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.out, self.time = nn.Conv2d(width, 1, 3, padding=1), nn.Linear(16, width)
        self.register_buffer("frequencies", torch.arange(1, 9) / 2)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:  # [B, 1, 8, 8], [B]
        angles = c_noise[:, None] * self.frequencies
        told = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        h = nn.functional.silu(self.into(x) + told[:, :, None, None])
        return self.out(nn.functional.silu(self.middle(h)) + h)


def digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


@torch.no_grad()
def compare(objective, network, learned, images: Tensor) -> list[tuple[float, float, float]]:
    """(the middle of a range of sigma, ln of the weighted error there, the mean of u there) for each range."""
    found = []
    for low, high in zip(EDGES, EDGES[1:]):
        sigma = torch.logspace(0, 1, len(images), base=high / low, dtype=torch.float64) * low
        noised = objective.noise(images, sigma, seed=1)
        error = objective.loss(network(noised.model_input, noised.model_time), noised)
        found.append(((low * high) ** 0.5, error.log().item(), learned(noised).mean().item()))
    return found


def main(argv: list[str] | None = None) -> list[tuple[float, float, float]]:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=3000)
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--quick", action="store_true", help="400 steps")
    options = made.parse_args(argv)
    torch.manual_seed(0)
    images = digits()
    objective = fastdiff.Objective(
        fastdiff.EDM(sigma_data=float(images.std())),
        "edm",
        weighting.EDMWeighting(),
        timesteps=timesteps.LogNormal(-1.2, 1.2),
    )
    network, learned = Network(), uncertainty.Fourier()
    optimizer = torch.optim.Adam(
        [{"params": network.parameters(), "lr": 2e-3}, {"params": learned.parameters(), "lr": 1e-2}]
    )
    for step in range(400 if options.quick else options.steps):
        noised = objective.noise(images[torch.randint(len(images), (options.batch,))])
        output = network(noised.model_input, noised.model_time)
        u = learned(noised)
        loss = objective.loss(output, noised, weight=torch.exp(-u)) + u.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:5d}   loss {loss.item():7.3f}")
    found = compare(objective, network, learned, images)
    print("\n sigma   ln error       u")
    for sigma, error, u in found:
        print(f"{sigma:6.3f} {error:10.3f} {u:7.3f}")
    return found


if __name__ == "__main__":
    main()
