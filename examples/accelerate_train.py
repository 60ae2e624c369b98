"""A small diffusion model trained with Hugging Face Accelerate and fastdiff, on handwritten digits.

    pip install accelerate scikit-learn
    accelerate launch examples/accelerate_train.py --steps 500 --mixed-precision bf16 --accumulate 2
    python examples/accelerate_train.py --cpu --steps 20 --checkpoint runs/digits --every 10
    python examples/accelerate_train.py --cpu --steps 40 --checkpoint runs/digits --resume

Noise and timesteps are functions of (seed, step, place in the global batch). So a run resumed from a checkpoint goes on
as it would have, and neither the number of processes nor gradient accumulation changes what is learned from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import fastdiff
from fastdiff.integrations.lightning import stepped_seed
from fastdiff.integrations.losses_per_timestep import TimestepLosses


class Network(nn.Module):
    """A few convolutions told the time and the class; enough to see a loss fall."""

    def __init__(self, width: int = 32, classes: int = 10):
        super().__init__()
        self.into, self.middle = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, 1, 3, padding=1)
        self.time, self.label = nn.Linear(8, width), nn.Embedding(classes, width)

    def forward(self, x, t, label):
        angles = t.float()[:, None] / 1000 * 2.0 ** torch.arange(4, device=t.device)
        told = self.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.label(label)
        h = nn.functional.silu(self.into(x) + told[:, :, None, None])
        return self.out(nn.functional.silu(self.middle(h)) + h)


class Progress:
    """The step, in the form in which Accelerate saves it with the rest."""

    step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def digits(device):
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return images.to(device), torch.from_numpy(data.target).long().to(device)


def main(argv: list[str] | None = None) -> list[float]:
    """Train; returns the loss of each step."""
    options = parser().parse_args(argv)
    accelerator = Accelerator(
        cpu=options.cpu,
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulate,
        log_with=options.log_with,
        project_dir=options.checkpoint,
    )
    if options.log_with:
        accelerator.init_trackers("fastdiff")
    processes, rank = accelerator.num_processes, accelerator.process_index
    share, rest = divmod(options.batch, processes * options.accumulate)
    if rest:
        raise SystemExit(f"--batch {options.batch} does not divide among {processes} processes x {options.accumulate}.")

    torch.manual_seed(options.seed)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network, optimizer = accelerator.prepare(network, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if options.resume:
        accelerator.load_state(options.checkpoint)

    process = fastdiff.VariancePreserving("cosine")
    objective = fastdiff.Objective(process, "v_prediction", fastdiff.MinSNR(5.0))
    images, labels = digits(accelerator.device)
    per_timestep = TimestepLosses(buckets=5)

    def loss_of(x0, label, seed, first):
        noised = objective.noise(x0, seed=seed, sample_offset=first)
        with accelerator.autocast():
            prediction = network(noised.model_input, noised.model_time, label)
        return objective.loss(prediction, noised, reduction="none"), noised

    if options.compile:
        loss_of = torch.compile(loss_of, backend=options.compile)

    losses = []
    while progress.step < options.steps:
        seed = torch.tensor([stepped_seed(options.seed, progress.step)], device=accelerator.device)
        total = torch.zeros((), device=accelerator.device)
        for part in range(options.accumulate):
            with accelerator.accumulate(network):
                first = (part * processes + rank) * share
                index = (progress.step * options.batch + first + torch.arange(share)) % len(images)
                rows, noised = loss_of(images[index], labels[index], seed, first)
                accelerator.backward(rows.mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                per_timestep.update(noised, rows)
                total += rows.detach().mean() / options.accumulate
        losses.append(accelerator.reduce(total, "mean"))
        progress.step += 1
        if progress.step % options.every == 0 or progress.step == options.steps:
            values = per_timestep.log_to(accelerator, progress.step)
            accelerator.print(f"step {progress.step}: loss {losses[-1].item():.4f}", json.dumps(values))
            if options.checkpoint:
                accelerator.save_state(options.checkpoint)
    losses = torch.stack(losses).tolist() if losses else []
    if options.losses and accelerator.is_main_process:
        Path(options.losses).write_text(json.dumps(losses))
    accelerator.wait_for_everyone()  # none leaves before the file is written
    accelerator.end_training()
    return losses


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--batch", type=int, default=64, help="of one optimizer step, over all processes")
    made.add_argument("--accumulate", type=int, default=1, help="batches an optimizer step is made of")
    made.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no")
    made.add_argument("--compile", metavar="BACKEND", help="compile noising, network and loss: inductor")
    made.add_argument("--checkpoint", metavar="FOLDER")
    made.add_argument("--every", type=int, default=50, help="steps between checkpoints and log entries")
    made.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    made.add_argument("--log-with", help="tensorboard, wandb, ...")
    made.add_argument("--losses", metavar="FILE", help="write the loss of each step")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--cpu", action="store_true")
    return made


if __name__ == "__main__":
    main()
