"""Diffusion forcing on small videos: a network that goes on from the frames it is given, on a CPU.

    python examples/video.py            # a minute or two
    python examples/video.py --quick    # ten seconds, too short to learn much

A video is a spot that moves by a pixel a frame, around the edges: [1, 8, 8, 8], channels, frames, height, width. A
network learns with a noise level for each frame and fused-SNR weights (Chen et al. 2024). Then it is given the first
two frames, kept clean, and draws the other six, which follow from them: all at once, or the nearer ones first (the
pyramid schedule).
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor, nn

import fastdiff

FRAMES, SIDE, HISTORY = 8, 8, 2


def videos(count: int, generator: torch.Generator) -> Tensor:
    """[N, 1, F, 8, 8] in [-1, 1]"""
    first = torch.randint(SIDE, (count, 1, 2), generator=generator)
    velocity = torch.randint(-1, 2, (count, 1, 2), generator=generator)
    places = (first + velocity * torch.arange(FRAMES).view(1, -1, 1)) % SIDE
    away = (torch.arange(SIDE) - places[..., None]) % SIDE  # [N, F, 2, 8]
    apart = torch.minimum(away, SIDE - away) ** 2
    apart = apart[:, :, 0, :, None] + apart[:, :, 1, None]
    return 2 * torch.exp(-apart / 2)[:, None] - 1


class Network(nn.Module):
    """The velocity of each frame, by attention among frames that are told their own noise levels."""

    def __init__(self, width: int = 128, layers: int = 2):
        super().__init__()
        self.into, self.time = nn.Linear(SIDE * SIDE, width), nn.Linear(16, width)
        self.place = nn.Parameter(torch.randn(FRAMES, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, SIDE * SIDE)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, 1, F, 8, 8], [B, F] -> [B, 1, F, 8, 8]"""
        angles = t.to(x.dtype)[..., None] * math.pi * 2.0 ** torch.arange(8)
        told = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        return self.out(self.layers(self.into(x[:, 0].flatten(2)) + told + self.place)).view_as(x)


def error(drawn: Tensor, true: Tensor) -> float:
    """The root mean squared error of the frames after the history."""
    return (drawn - true)[:, :, HISTORY:].square().mean().sqrt().item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, then draw: the numbers that are printed."""
    options = parser().parse_args(argv)
    steps = options.steps or (300 if options.quick else 3000)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    network = Network()
    objective = fastdiff.video.RFLoss(per="frame")
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps + 1)

    start, losses = time.perf_counter(), []
    for _ in range(steps):
        noised = objective.noise(videos(options.batch, generator), generator=generator)
        prediction = network(noised.x_t, noised.model_time.flatten(1))
        loss = objective.loss(prediction, noised, weight=fastdiff.video.fused_snr(noised))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    print(f"{steps} steps of training in {time.perf_counter() - start:.0f} s")

    network.eval()
    known = videos(options.draw, generator)
    numbers = {"first loss": float(losses[0]), "last loss": float(torch.stack(losses[-20:]).mean())}
    for kind in ("full_sequence", "pyramid"):
        levels = fastdiff.video.frame_schedule(kind, options.levels, FRAMES)
        levels[:, :HISTORY] = 0  # history: clean from the start
        drawn = fastdiff.video.sample(network, known.shape, objective, levels, known=known, seed=options.seed)
        assert torch.equal(drawn[:, :, :HISTORY], known[:, :, :HISTORY])
        numbers[kind] = error(drawn, known)
        print(f"{kind}: {numbers[kind]:.3f} from the true frames, in {len(levels) - 1} calls of the network")
    still = error(known[:, :, HISTORY - 1 : HISTORY].expand_as(known), known)
    print(f"a spot that stays where it was: {still:.3f}")
    return numbers | {"still": still}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, help="of training; 3,000, and 300 with --quick")
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--draw", type=int, default=128, help="how many videos")
    made.add_argument("--levels", type=int, default=20, help="noise levels from noise to a clean frame")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="less training")
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
