"""Churn: noise added before a step, to go back up a little (Karras et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..process import Levels, Process
from .schedule import Path, Scheduled


@dataclass(frozen=True, kw_only=True)
class Churned(Scheduled):
    """Base of the samplers that may churn: the network is called at sigma (1 + gamma), gamma = min(s_churn / steps,
    sqrt(2) - 1), with the noise that was missing added.

    Args:
        s_churn: overall strength; 0 adds no noise.
        s_tmin, s_tmax: only where sigma / alpha lies in this interval.
        s_noise: factor on the noise.
        and those of ``Scheduled``.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.s_churn >= 0:
            raise ValueError(f"s_churn must be at least 0; got {self.s_churn!r}.")

    def churned(self, process: Process, steps: int | None) -> tuple[Path, tuple[float, float] | None, Tensor, Tensor]:
        """(path with the churned levels in place of those visited, start, factor and noise after each step).

        The churn of a step is part of the row before it, and that of the first is the plan's ``start``: then a step is
        still one pass. ``path.ends`` are the levels before churn.
        """
        path = self.path(process, steps)
        none = torch.zeros_like(path.alpha[1:])
        if self.s_churn == 0:
            return path, None, none + 1, none
        if process.straight:
            raise ValueError(f"churn (s_churn={self.s_churn}) adds noise to x_t / alpha, which a flow does not have.")
        plain = path.levels
        level = plain.sigma / plain.alpha
        gamma = min(self.s_churn / len(level), math.sqrt(2) - 1)
        churns = (level >= self.s_tmin) & (level <= self.s_tmax) & level.isfinite()
        raised = process.levels_at(torch.where(churns, level * (1 + gamma), 1.0))
        time = raised.t if bool(churns.any()) else plain.t
        levels = Levels(
            torch.where(churns, time, plain.t),
            torch.where(churns, raised.alpha, plain.alpha),
            torch.where(churns, raised.sigma, plain.sigma),
            process,
        )
        factor = levels.alpha / plain.alpha
        added = self.s_noise * levels.alpha * torch.where(churns, level * math.sqrt(gamma * (2 + gamma)), 0.0)
        start = (float(factor[0]), float(added[0]))
        one, zero = torch.ones_like(factor[:1]), torch.zeros_like(factor[:1])
        path = Path(levels, path.times, path.alpha, path.sigma)
        return path, start, torch.cat([factor[1:], one]), torch.cat([added[1:], zero])

    @staticmethod
    def ends_with(path: Path, after: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) where each step ends with the churn that follows."""
        return after * path.ends[0], torch.hypot(after * path.ends[1], added)

    @staticmethod
    def first_std(process: Process, path: Path) -> float:
        """The deviation of x before the first churn: see ``initial_std``."""
        return 1.0 if process.variance_preserving else float(path.sigma[0])
