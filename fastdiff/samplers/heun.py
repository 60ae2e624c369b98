"""Heun's method: two calls of the network a step, two rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import prediction as kinds
from ..prediction import Prediction
from ..process import Levels, Process
from .base import Plan, build_plan
from .churn import Churned
from .euler import euler_columns, need_flow
from .schedule import Path


@dataclass(frozen=True)
class Heun(Churned):
    """Heun's method for dx/dsigma = (x - x0) / sigma in the space of x_t / alpha, second order (Karras et al. 2022,
    algorithm 2). A step to clean data is Euler's: N steps are then 2 N - 1 calls of the network.

    Args: those of ``Churned`` and ``Scheduled``.
    """

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        path, start, after, added = self.churned(process, steps)
        # Heun's method runs on u = x / here against s = sigma / here, where the slope is du/ds = (u - data x0) / s.
        here, there, data = self._coordinates(process, path.levels.alpha, path.ends[0])
        if not bool((here > 0).all()):
            raise ValueError(
                f"{type(self).__name__} works in x_t / alpha, but alpha is 0 at the first level of {process!r}: use "
                f"timesteps that begin later."
            )
        alpha, sigma = path.levels.alpha, path.levels.sigma
        ratio = path.ends[1] / there / (sigma / here)
        euler = euler_columns(alpha, sigma, path.ends)
        # First row: x' by Euler; kept: H, half a step along the first slope. Second row, at x': H and half a step more.
        back = (1 - 1 / ratio) / 2
        zero = torch.zeros_like(ratio)
        first = euler | {"h_x": there / here * (1 + ratio) / 2, "h_x0": there * data * (1 - ratio) / 2}
        second = {"c_h1": after, "c_x": after * back, "c_x0": -after * back * there * data, "c_noise": added}
        one_row = path.ends[1] == 0
        kept = torch.stack([torch.ones_like(one_row), ~one_row], 1).flatten()

        def rows(a: Tensor, b: Tensor) -> Tensor:
            return torch.stack([a.to(b.dtype), b], 1).flatten()[kept]

        columns = {
            name: rows(first.get(name, zero), second.get(name, zero)) for name in dict.fromkeys([*first, *second])
        }
        ones = rows(one_row, one_row)
        for name in ("h_x", "h_x0"):  # nothing reads what the step to clean data would keep
            columns[name] = torch.where(ones, 0.0, columns[name])
        times = rows(path.levels.t, path.times[1:])
        levels = Levels(
            times if path.levels.t.is_floating_point() or self.final_sigma else times.long(),
            rows(alpha, path.ends[0]),
            rows(sigma, path.ends[1]),
            process,
        )
        alphas, sigmas = (rows(a, b) for a, b in zip(path.ends, self.ends_with(path, after, added)))
        index = torch.arange(len(ratio), device="cpu")
        return build_plan(
            kinds.get(prediction),
            levels,
            (alphas, sigmas),
            tuple((columns["c_noise"] > 0).tolist()),
            columns,
            self.first_std(process, path),
            clip=self.clip,
            start=start,
            steps=tuple(rows(index, index).tolist()),
        )

    def _coordinates(self, process: Process, alpha: Tensor, end: Tensor) -> tuple[Tensor, Tensor, float]:
        """(here, there, data): see ``plan``."""
        return alpha, end, 1.0


@dataclass(frozen=True, kw_only=True)
class EDM(Heun):
    """The sampler of Karras et al. 2022, algorithm 2: ``Heun`` on Karras sigmas. Their stochastic sampler has s_churn,
    s_tmin, s_tmax and s_noise too (table 5: 40, 0.05, 50 and 1.003 for ImageNet-64)."""

    sigmas: str | Sequence[float] | None = "karras"

    def __post_init__(self):
        if self.timesteps is not None and self.sigmas == "karras":
            object.__setattr__(self, "sigmas", None)
        super().__post_init__()


@dataclass(frozen=True)
class FlowHeun(Heun):
    """Heun's method for the velocity of a RectifiedFlow, in sigma (diffusers' FlowMatchHeun)."""

    def path(self, process: Process, steps: int | None) -> Path:
        need_flow(self, process)
        return super().path(process, steps)

    def _coordinates(self, process: Process, alpha: Tensor, end: Tensor) -> tuple[Tensor, Tensor, float]:
        return torch.ones_like(alpha), torch.ones_like(end), 1 / (1 - process.sigma_min)
