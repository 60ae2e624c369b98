"""Handwritten digits by classifier guidance: the diffusion model knows no labels, and a classifier of noisy digits
leads it to the one that is wanted (Dhariwal and Nichol 2021).

    pip install scikit-learn
    python examples/classifier_guidance.py            # two minutes on a CPU
    python examples/classifier_guidance.py --quick    # twenty seconds

Two networks are trained on the same noise: one predicts it, the other the label of the digit that is under it. Samples
are drawn with the gradient of the second and without it. A judge that has seen real digits says how many it takes for
the digit that was wanted: a tenth, by chance, without the classifier.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastdiff
from fastdiff.demo.classifier import train_classifier
from fastdiff.demo.data import digits


class Network(nn.Module):
    """Images [B, 1, 8, 8] at timesteps [B] -> ``outputs`` numbers for each."""

    def __init__(self, outputs: int, width: int = 256, blocks: int = 3):
        super().__init__()
        self.into, self.out, self.time = nn.Linear(64, width), nn.Linear(width, outputs), nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = (t.float() / 1000)[:, None] * 2.0 ** torch.arange(8)
        told = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        h = self.into(x.flatten(1))
        for block in self.blocks:
            h = h + block(h + told)
        return self.out(F.silu(h))


class Denoiser(Network):
    """Predicts the noise, shaped as the images."""

    def __init__(self):
        super().__init__(64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).view_as(x)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train both, then sample: the numbers that are printed."""
    options = parser().parse_args(argv)
    steps = options.steps or (1000 if options.quick else 6000)
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    data, denoiser, classifier = digits(), Denoiser(), Network(10)
    averaged = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    optimizer = torch.optim.AdamW([*denoiser.parameters(), *classifier.parameters()], lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    start = time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(len(data.images), (options.batch,), generator=generator)
        noised = objective.noise(data.images[chosen], generator=generator)
        loss = objective.loss(denoiser(noised.x_t, noised.model_time), noised)
        # What makes the classifier fit for guidance: it is trained at every noise level, and told which it is.
        guiding = F.cross_entropy(classifier(noised.x_t, noised.model_time), data.labels[chosen])
        optimizer.zero_grad()
        (loss + guiding).backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(denoiser)
    print(f"{steps} steps of training in {time.perf_counter() - start:.0f} s")

    labels = torch.arange(500) % 10
    judge = train_classifier(data.images, data.labels)
    gradient = fastdiff.guidance.classifier_gradient(classifier.eval(), labels, options.scale)
    found = {"held out": judge.held_out_accuracy}
    for name, cond_fn in (("without", None), ("with", gradient)):
        made = objective.sample(
            averaged, (len(labels), 1, 8, 8), "ddim", options.sampling_steps, cond_fn=cond_fn, seed=options.seed,
            progress=False,
        )  # fmt: skip
        found[name] = (judge.recognise(made) == labels).float().mean().item()
        print(f"{name} the classifier: {found[name]:.1%} of {len(labels)} are the digit that was wanted")
    print(f"real digits that the judge had not seen: {found['held out']:.1%} recognised")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, help="of training; 6,000, and 1,000 with --quick")
    made.add_argument("--sampling-steps", type=int, default=50)
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--scale", type=float, default=2.0, help="of the classifier's gradient")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="less training")
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)  # for so small a network more threads are slower
    main()
