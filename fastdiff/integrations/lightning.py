"""A mixin that makes a LightningModule a diffusion trainer. Lightning itself is not imported::

    class Model(DiffusionTraining, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0))
            self.network = ...

        def forward(self, x, t, labels):
            return self.network(x, t, labels)

        def configure_optimizers(self): ...

A batch is x0, or a tuple (x0, further arguments of forward ...); for dictionaries override ``unpack``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..objective import Objective
from .losses_per_timestep import TimestepLosses

__all__ = ["DiffusionTraining", "stepped_seed"]

_MASK = 2**64 - 1


class DiffusionTraining:
    """``training_step`` and ``validation_step`` of a network trained with ``self.objective``.

    Set on the module, or as class attributes.

    Attributes:
        objective: a ``fastdiff.Objective``.
        noise_seed: an int makes t and noise of the k-th batch a function of (noise_seed, k, place in the global batch),
            whatever the number of ranks; k is kept in the checkpoint, so a resumed run goes on with the noise it would
            have had. None (the default) draws the seeds from PyTorch's generator.
        per_timestep: the number of intervals of t in which the loss is logged too, every ``log_every_n_steps`` of the
            trainer; 0: none.

    Lightning itself divides, scales and calls backward on the loss that ``training_step`` returns. So there is no place
    for the gradient of ``Objective.loss_and_gradient``.

    Validation uses one seed for every batch index, so that its losses can be compared from epoch to epoch.
    """

    objective: Objective
    noise_seed: int | None = None
    per_timestep: int = 0

    _batches_seen: int = 0
    _timestep_losses: TimestepLosses | None = None

    def unpack(self, batch: Any) -> tuple[Tensor, tuple]:
        """(x0, further arguments of forward). Override for batches of another form.

        Raises TypeError for a dictionary: which entry is x0, and what the others are, is not known.
        """
        if isinstance(batch, Mapping):
            raise TypeError(
                f"a batch is a {type(batch).__name__} with {', '.join(map(repr, batch))}: override unpack(self, batch) "
                f"to return (x0, (further arguments of forward ...)), such as (batch[{next(iter(batch), 0)!r}], ())."
            )
        return (batch, ()) if isinstance(batch, Tensor) else (batch[0], tuple(batch[1:]))

    def diffusion_loss(self, batch: Any, seed: int | None = None, reduction: str = "mean") -> Tensor:
        """Noise the batch, call the network, return the loss. Raises TypeError without an objective."""
        return self._loss(batch, seed, reduction)[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        seed = None
        if self.noise_seed is not None:
            seed = stepped_seed(self.noise_seed, self._batches_seen)
            self._batches_seen += 1
        rows, noised = self._loss(batch, seed, "none" if self.per_timestep else "mean")
        if not self.per_timestep:
            self.log("train/loss", rows)
            return rows
        loss = rows.mean()
        self.log("train/loss", loss)
        if self._timestep_losses is None:
            self._timestep_losses = TimestepLosses(self.per_timestep, "train/loss")
        self._timestep_losses.update(noised, rows)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0 and self.trainer.logger is not None:
            self._timestep_losses.log_to(self.trainer.logger, self.global_step)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.diffusion_loss(batch, stepped_seed(self.noise_seed or 0, -1 - batch_idx))
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["fastdiff_batches_seen"] = self._batches_seen

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._batches_seen = checkpoint.get("fastdiff_batches_seen", 0)

    def _loss(self, batch: Any, seed: int | None, reduction: str) -> tuple[Tensor, Any]:
        objective = getattr(self, "objective", None)
        if not isinstance(objective, Objective):
            raise TypeError(f"set self.objective to a fastdiff.Objective before training; it is {objective!r}.")
        x0, arguments = self.unpack(batch)
        offset = 0 if seed is None else getattr(self, "global_rank", 0) * len(x0)
        noised = objective.noise(x0, seed=seed, sample_offset=offset)
        prediction = self(noised.model_input, noised.model_time, *arguments)
        return objective.loss(prediction, noised, reduction=reduction), noised


def stepped_seed(seed: int, step: int) -> int:
    """The 64-bit seed of a step: a function of both that does not repeat for neighbouring seeds or steps."""
    # A round of splitmix64 (Steele et al. 2014) for each.
    state = 0
    for value in (seed, step):
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state
