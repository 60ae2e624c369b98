"""DDPM: ancestral sampling from the Gaussian posterior q(x_s | x_t, x0), for any process and any steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import prediction as kinds
from ..ops.checks import check_clip
from ..prediction import Prediction
from ..process import MIN_VARIANCE, Process, transition
from . import spacing as spacings
from .base import Plan, Sampler, build_plan, following

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ho et al. 2020, algorithm 2, and Nichol and Dhariwal 2021 for learned variances and fewer steps.

    Args:
        variance: "fixed_small" is the posterior's variance, "fixed_large" that of the forward step (beta_t). "learned":
            the network returns a log-variance too; "learned_range": v in [-1, 1], interpolating the logarithms of the
            two. Both want twice the channels from the network, the variance second.
        clip: clamp the x0 estimate to [-clip, clip]; None leaves it (latents have no bounds).
        spacing, steps_offset: see ``fastdiff.samplers.spacing.discrete_timesteps``.
        timesteps: visit these times, noisiest first.
        final_noise: the last step, to clean data, adds none. True adds it unless its t is 0, as diffusers does for
            spacings that do not end at 0.

    With prediction="previous_sample" (the network predicts the posterior mean) and all steps, the mean is the network's
    output itself.
    """

    variance: str = "fixed_small"
    clip: float | None = None
    spacing: str = "trailing"
    steps_offset: int = 0
    timesteps: Sequence[float] | None = None
    final_noise: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._freeze("timesteps")
        check_clip(self.clip)
        if self.variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}; got {self.variance!r}.")

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        prediction = kinds.get(prediction)
        times = spacings.times(process, steps, self.spacing, self.steps_offset, self.timesteps)
        levels = process.levels(times)
        ends = following(levels)
        c_x0, c_x, small, large = transition(levels.alpha, levels.sigma, *ends)
        draws = [True] * (len(times) - 1) + [self.final_noise and float(times[-1]) > 0]
        small = small.clamp(min=MIN_VARIANCE)
        columns = {"c_x0": c_x0, "c_x": c_x}
        if self.variance == "fixed_small":
            columns["c_noise"] = small.sqrt()
        elif self.variance == "fixed_large":
            columns["c_noise"] = large.sqrt()
        elif self.variance == "learned":
            columns |= {"c_noise": torch.ones_like(small), "l_v": torch.ones_like(small)}
        else:
            columns |= {"c_noise": torch.ones_like(small)} | learned_range_columns(small.log(), large.log())
        gradient = columns["c_noise"] ** 2
        columns["c_noise"] = columns["c_noise"] * torch.tensor(draws, device="cpu")
        return build_plan(
            prediction,
            levels,
            ends,
            tuple(draws),
            columns,
            learned_variance=self.variance in ("learned", "learned_range"),
            clip=self.clip,
            gradient=gradient,
            gradient_of_mean=True,
        )


def learned_range_columns(small: Tensor, large: Tensor) -> dict[str, Tensor]:
    """The log-variance (v + 1) / 2 large + (1 - v) / 2 small = l_0 + l_v v, from the logarithms of the two variances
    [rows]. Nichol and Dhariwal 2021, equation 15."""
    return {"l_0": (large + small) / 2, "l_v": (large - small) / 2}
