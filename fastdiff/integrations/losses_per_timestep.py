"""Loss by timestep, gathered on the device::

    per_timestep = TimestepLosses(buckets=10)
    rows = objective.loss(prediction, noised, reduction="none")
    per_timestep.update(noised, rows)
    rows.mean().backward()
    if step % 100 == 0:
        per_timestep.log_to(writer, step)      # a TensorBoard writer, wandb, an accelerator, a Lightning logger

Nothing waits for it until the numbers are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..noised import Noised
from ..process import check_by

__all__ = ["TimestepLosses"]


class TimestepLosses:
    """Means of a loss in equal intervals of the process, since they were last asked for.

    Args:
        buckets: number of intervals of the fraction t / T (t itself for processes on [0, 1]; 1 - t with their
            ``data_at=1``); 0 is clean data. For processes without one (EDM), ``update`` needs ``fraction``.
        name: what the entries are called: "loss/t_0.00-0.10", ...; "loss/sigma_0.00-0.10" by sigma.
        by: "fraction", which is before the shift of a shifted flow, or "sigma", the noise level that its network is
            told.
    """

    def __init__(self, buckets: int = 10, name: str = "loss", by: str = "fraction"):
        if not isinstance(buckets, int) or buckets < 1:
            raise ValueError(f"buckets must be a positive integer; got {buckets!r}.")
        check_by(by)
        self.buckets, self.name, self.by = buckets, name, by
        self._sums: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def update(self, noised: Noised, losses: Tensor, fraction: Tensor | None = None) -> None:
        """Add the losses of a batch.

        Args:
            noised: from ``Objective.noise``.
            losses: one a row, as ``Objective.loss`` gives them with reduction="none"; NaN is not counted.
            fraction: shaped as losses, in [0, 1]; None: that of ``noised.t``.

        Raises ValueError for losses that are not one a row.
        """
        if losses.shape != noised.t.shape:
            raise ValueError(
                f"losses must be one a row, {tuple(noised.t.shape)}; got {tuple(losses.shape)}. "
                f"objective.loss(..., reduction='none') gives them."
            )
        if fraction is None:
            process = noised.objective.process
            fraction = (
                process.fraction(noised.t) if self.by == "fraction" else process.levels(noised.t).measured(self.by)
            )
        bucket = (fraction * self.buckets).long().clamp(0, self.buckets - 1).flatten()
        losses = losses.detach().flatten()
        counted = ~losses.isnan()
        found = torch.stack([torch.where(counted, losses, 0.0).float(), counted.float()], -1)
        if losses.device not in self._sums:
            self._sums[losses.device] = torch.zeros(self.buckets, 2, dtype=torch.float32, device=losses.device)
        self._sums[losses.device].index_add_(0, bucket, found)

    def compute(self, reset: bool = True) -> dict[str, float]:
        """Means of the intervals that have been seen, by name. Waits for the device; starts anew unless not ``reset``.

        With torch.distributed initialised, those of all ranks: then every rank must call it.
        """
        if not self._sums and not _distributed():
            return {}
        device = next(iter(self._sums), torch.device("cpu"))
        total = torch.zeros(self.buckets, 2, dtype=torch.float32, device=device)
        for sums in self._sums.values():
            total += sums.to(device)
        if _distributed():
            torch.distributed.all_reduce(total)
        if reset:
            self._sums.clear()
        edges = [index / self.buckets for index in range(self.buckets + 1)]
        return {
            f"{self.name}/{'t' if self.by == 'fraction' else 'sigma'}_{low:.2f}-{high:.2f}": loss / count
            for low, high, (loss, count) in zip(edges, edges[1:], total.tolist())
            if count
        }

    def log_to(self, logger: Any, step: int) -> dict[str, float]:
        """``compute`` and pass on: to ``add_scalar`` (TensorBoard), ``log_metrics`` (Lightning) or ``log`` (wandb,
        Accelerate). Returns what was logged. Raises TypeError for a logger with none of these."""
        takes = [name for name in ("add_scalar", "log_metrics", "log") if callable(getattr(logger, name, None))]
        if not takes:
            raise TypeError(f"{type(logger).__name__} has no add_scalar, log_metrics or log.")
        values = self.compute()
        if takes[0] == "add_scalar":
            for name, value in values.items():
                logger.add_scalar(name, value, step)
        elif values:
            getattr(logger, takes[0])(values, step=step)
        return values


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
