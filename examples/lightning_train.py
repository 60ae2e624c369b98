"""A small diffusion model trained with Lightning and fastdiff, on handwritten digits.

pip install lightning scikit-learn
python examples/lightning_train.py --steps 500 --precision bf16-mixed
python examples/lightning_train.py --steps 1000 --resume runs/lightning/last.ckpt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdiff
from fastdiff.integrations.lightning import DiffusionTraining


class DigitModel(DiffusionTraining, lightning.LightningModule):
    """Everything but the network is the mixin's."""

    def __init__(self, width: int = 32):
        super().__init__()
        process = fastdiff.VariancePreserving("cosine")
        self.objective = fastdiff.Objective(process, "v_prediction", fastdiff.MinSNR(5.0))
        self.noise_seed, self.per_timestep = 0, 5
        self.into, self.middle = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.out, self.time, self.label = (
            nn.Conv2d(width, 1, 3, padding=1),
            nn.Linear(2, width),
            nn.Embedding(10, width),
        )

    def forward(self, x, t, label):
        angle = t.float()[:, None] / 1000
        told = self.time(torch.cat([angle.sin(), angle.cos()], -1)) + self.label(label)
        h = nn.functional.silu(self.into(x) + told[:, :, None, None])
        return self.out(nn.functional.silu(self.middle(h)) + h)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(batch: int) -> DataLoader:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return DataLoader(TensorDataset(images, torch.from_numpy(data.target).long()), batch, shuffle=False, drop_last=True)


def main(argv: list[str] | None = None) -> tuple[lightning.Trainer, DigitModel]:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--precision", default="32-true")
    made.add_argument("--accumulate", type=int, default=1)
    made.add_argument("--accelerator", default="auto")
    made.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    made.add_argument("--every", type=int, default=10)
    made.add_argument("--resume", metavar="CHECKPOINT")
    options = made.parse_args(argv)
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        accelerator=options.accelerator,
        precision=options.precision,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=1.0,
        log_every_n_steps=options.every,
        logger=CSVLogger(options.folder),
        callbacks=[ModelCheckpoint(options.folder, save_last=True, every_n_train_steps=options.every)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = DigitModel()
    trainer.fit(model, loader(options.batch), ckpt_path=options.resume)
    return trainer, model


if __name__ == "__main__":
    main()
