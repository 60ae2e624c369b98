"""Drawing t by how large its loss is: loss-second-moment resampling (Nichol and Dhariwal 2021, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_alike, check_floating
from ..process import Process, check_process
from ..timesteps import Timesteps


class LossSecondMoment(Timesteps):
    """Draws t with a probability proportional to the root of the mean square of its last losses.

        resampler = LossSecondMoment(process)
        objective = fastdiff.Objective(process, timesteps=resampler)
        noised = objective.noise(x0)
        losses = bound.loss(network(noised.x_t, noised.t), noised, reduction="none")
        resampler.update(noised.t, losses)
        (losses * resampler.weight(noised.t)).mean().backward()

    Until each t has ``history`` losses, t is drawn uniformly and weighs 1. No call waits for a device: the state lies
    where the losses do.

    Args:
        process: a discrete process.
        history: the losses that are kept of each t.
        uniform: the share of the draws that is uniform.

    Raises TypeError or ValueError for unfit arguments.
    """

    def __init__(self, process: Process, history: int = 10, uniform: float = 0.001):
        check_process(process)
        if not process.discrete:
            raise ValueError(f"losses are kept of each timestep of a discrete process; got {process!r}.")
        if type(history) is not int or history < 1:
            raise ValueError(f"history must be a whole number of losses, at least 1; got {history!r}.")
        if isinstance(uniform, bool) or not isinstance(uniform, (int, float)) or not 0 < uniform <= 1:
            raise ValueError(f"uniform must lie in (0, 1]; got {uniform!r}.")
        self.history, self.uniform = history, float(uniform)
        # Of each t its last losses, in a ring, and how many there ever were.
        self._losses = torch.zeros(process.steps, history, dtype=torch.float64, device="cpu")
        self._counts = torch.zeros(process.steps, dtype=torch.int64, device="cpu")

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        if process.steps != len(self._counts):
            raise ValueError(f"the losses are of {len(self._counts)} timesteps, but the process is {process!r}.")
        self._to(u.device)
        bounds = self.probabilities().cumsum(0)
        # The last bound is 1 but for its rounding.
        return torch.searchsorted(bounds, u * bounds[-1], right=True).clamp(max=len(bounds) - 1)

    def probabilities(self) -> Tensor:
        """Of each t: float64 [steps]."""
        steps = len(self._counts)
        root = (self._losses**2).mean(1).sqrt()
        total = root.sum()
        share = torch.where(total > 0, root / total, 1 / steps)
        warm = (self._counts >= self.history).all()
        return torch.where(warm, (1 - self.uniform) * share + self.uniform / steps, 1 / steps)

    def weight(self, t: Tensor) -> Tensor:
        """1 / (steps p(t)), which makes a mean over the t that are drawn one over all: float32 [batch]."""
        self._to(t.device)
        return (1 / (len(self._counts) * self.probabilities()[t])).float()

    def update(self, t: Tensor, losses: Tensor, gather: bool = False) -> None:
        """Note losses, which are detached.

        Args:
            t, losses: [batch].
            gather: of all processes of ``torch.distributed``, which all call this with batches of one size; then all
                have the same state.
        """
        check_floating(losses=losses)
        check_alike(losses=losses, t=t)
        if losses.ndim != 1:
            raise ValueError(f"losses must be one a sample, [batch]; got shape {tuple(losses.shape)}.")
        t, losses = t.detach().long(), losses.detach().double()
        if gather:
            import torch.distributed as distributed

            t, losses = (_gathered(distributed, part) for part in (t, losses))
        self._to(t.device)
        # A t that is there more than once takes one place of its ring after another.
        t, order = t.sort(stable=True)
        index = torch.arange(len(t), device=t.device)
        begins = torch.cat([torch.ones_like(t[:1], dtype=torch.bool), t[1:] != t[:-1]])
        first = torch.where(begins, index, 0).cummax(0).values
        place = index - first
        count = torch.zeros_like(self._counts).index_add_(0, t, torch.ones_like(t))
        # Of more than fit the last are kept.
        kept = place >= count[t] - self.history
        # The others go to a place behind the rings: to leave them out by a mask would wait for the device.
        to = torch.where(kept, t * self.history + (self._counts[t] + place) % self.history, self._losses.numel())
        rings = torch.cat([self._losses.flatten(), self._losses.new_zeros(1)])
        self._losses = rings.index_put_((to,), losses[order])[:-1].view_as(self._losses)
        self._counts += count

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: ``losses`` float64 [steps, history], ``counts`` int64 [steps]."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``. Raises ValueError for one of other settings."""
        for name, own in self.state_dict().items():
            if not isinstance(state.get(name), Tensor) or state[name].shape != own.shape:
                given = tuple(state[name].shape) if isinstance(state.get(name), Tensor) else state.get(name)
                raise ValueError(f"the state's {name} must have shape {tuple(own.shape)}; got {given!r}.")
        self._losses = state["losses"].to(self._losses).clone()
        self._counts = state["counts"].to(self._counts).clone()

    def _to(self, device: torch.device) -> None:
        if self._counts.device != device:
            self._losses, self._counts = self._losses.to(device), self._counts.to(device)


def _gathered(distributed: Any, part: Tensor) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)
