"""LCM: few-step sampling of a latent consistency model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import prediction as kinds
from ..ops.checks import check_clip
from ..prediction import Prediction
from ..process import Process
from . import spacing as spacings
from .base import Plan, Sampler, build_plan, following


@dataclass(frozen=True, kw_only=True)
class LCM(Sampler):
    """Luo et al. 2023 (Latent Consistency Models), algorithm 3: denoise by c_skip x + c_out x0, then noise of its own
    up to the next timestep; none on the last.

    Args:
        original_steps: the steps of the distillation, of which ``steps`` are taken.
        timestep_scaling, sigma_data: of c_skip = d^2 / (s^2 + d^2) and c_out = s / sqrt(s^2 + d^2), s = scaling t.
        timesteps: visit these instead, noisiest first.
        clip: clamp the x0 estimate to [-clip, clip].
    """

    original_steps: int = 50
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5
    timesteps: Sequence[int] | None = None
    clip: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self._freeze("timesteps")
        check_clip(self.clip)
        if self.original_steps < 1:
            raise ValueError(f"original_steps must be at least 1; got {self.original_steps!r}.")

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        if not process.noisiest_last:
            raise ValueError(f"LCM needs a process with discrete timesteps (VariancePreserving); got {process!r}.")
        times = self.timesteps
        if times is None:
            times = self._spaced(process.steps, 4 if steps is None else steps)
        elif steps is not None and steps != len(times):
            raise ValueError(f"{len(times)} timesteps were given and steps={steps}: leave steps out.")
        levels = process.levels(torch.tensor(spacings.checked_timesteps(times, process.steps), device="cpu"))
        alpha, sigma = following(levels)
        columns = lcm_columns(alpha, levels.t, self.timestep_scaling, self.sigma_data) | {"c_noise": sigma}
        draws = (True,) * (len(times) - 1) + (False,)
        return build_plan(kinds.get(prediction), levels, (alpha, sigma), draws, columns, clip=self.clip)

    def _spaced(self, total: int, steps: int) -> list[int]:
        if self.original_steps > total:
            raise ValueError(f"original_steps={self.original_steps} exceeds the {total} timesteps of the process.")
        if not 1 <= steps <= self.original_steps:
            raise ValueError(f"steps must lie in [1, {self.original_steps}], the steps of distillation; got {steps}.")
        stride = total // self.original_steps
        original = [stride * (k + 1) - 1 for k in range(self.original_steps)][::-1]
        return [original[k * self.original_steps // steps] for k in range(steps)]


def lcm_columns(end: Tensor | float, t: Tensor, scaling: float, sigma_data: float) -> dict[str, Tensor]:
    """``end`` times the denoised sample c_skip x + c_out x0 at the timesteps ``t`` [rows]. With ``end`` = 1 the columns
    are c_skip and c_out."""
    scaled, data = scaling * t.double(), sigma_data
    return {
        "c_x": end * data**2 / (scaled**2 + data**2),
        "c_x0": end * scaled / torch.hypot(scaled, torch.full_like(scaled, data)),
    }
