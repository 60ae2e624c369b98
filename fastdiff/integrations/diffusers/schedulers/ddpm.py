"""DDPMScheduler and DDPMParallelScheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....ops.step_table import DRAW, ONE_DTYPE, X0
from ....process import MIN_VARIANCE
from ....samplers.ddpm import learned_range_columns
from ..add_noise import BY_TIMESTEP
from ..coefficient_cache import Unfit, host, kind_of, need
from ..rows import Columns, estimate
from ..source_digests import Method
from ..step import fused_step
from ..stepper import NO_ROW, Options, Passes, Stepper


def columns(now: Tensor, before: Tensor, kind: str, variance: str) -> Columns:
    """From alpha_bar ``now`` to alpha_bar ``before``, [rows] each, both in the scheduler's dtype. Ho et al. 2020,
    equations 6 and 7.

    diffusers rounds alpha_t = now / before to that dtype, and with a thousand steps 1 - alpha_t is left with four
    digits: the quotient is taken as it has it, and nothing else is.
    """
    kept = (now / before).double()
    now, before = now.double(), before.double()
    beta = 1 - kept
    posterior = ((1 - before) / (1 - now) * beta).clamp(min=MIN_VARIANCE)
    made = estimate(kind, now.sqrt(), (1 - now).sqrt())
    made |= {"c_x0": before.sqrt() * beta / (1 - now), "c_x": kept.sqrt() * (1 - before) / (1 - now)}
    if variance == "learned_range":
        return made | {"c_noise": torch.ones_like(now)} | learned_range_columns(posterior.log(), beta.log())
    return made | {"c_noise": (beta if variance == "fixed_large" else posterior).sqrt()}


class DDPM(Stepper):
    """A row for each timestep. Noise is drawn but at timestep 0. There is no history and no state."""

    tensor_names = ("timesteps", "alphas_cumprod", "one")
    other_names = ("num_inference_steps", "custom_timesteps", "variance_type")
    by_timestep = True

    def make(self, scheduler: Any, config: Any) -> None:
        kind = kind_of(config)
        self.one_dtype = kind == "sample"
        self.learned = scheduler.variance_type == "learned_range"
        if scheduler.variance_type != config.variance_type:
            raise Unfit("variance_type differs from the config's")
        need(config, variance_type=("fixed_small", "fixed_small_log", "fixed_large", "learned_range"))
        self.limit_x0(config)
        bars = host(scheduler.alphas_cumprod)
        if scheduler.custom_timesteps or scheduler.num_inference_steps:
            now = self.host_times
            before = torch.cat([now[1:], torch.full_like(now[:1], -1)])
        else:
            now = torch.arange(len(bars), device="cpu")
            before = now - 1
        if now.is_floating_point() or not bool(((now >= 0) & (now < len(bars)) & (before < len(bars))).all()):
            raise Unfit("timesteps beyond the schedule")
        before_bars = torch.where(before >= 0, bars[before], host(scheduler.one))
        self.place(columns(bars[now], before_bars, kind, config.variance_type))
        self.at = {t: k for k, t in reversed(list(enumerate(now.tolist())))}  # the first of equal ones

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        k = self.at.get(t)
        if k not in self.usable:
            return NO_ROW
        return ((k, (), None, X0 | ONE_DTYPE | DRAW if t else X0 | ONE_DTYPE),)

    def finish(self, scheduler: Any, timestep: Any, x: Tensor, m: Tensor, done: tuple) -> Tensor:
        return done[1]


METHODS = {
    "step": Method(
        fused_step,
        DDPM,
        {
            "step": ("569e5beb30c0", "4eac4a707d4d"),
            "previous_timestep": ("158de1e77bfc",),
            "_get_variance": ("9ec98c58c49b",),
            "_threshold_sample": ("35d85792db7a",),
        },
    ),
    **BY_TIMESTEP,
}
SCHEDULERS = {"DDPMScheduler": METHODS, "DDPMParallelScheduler": METHODS}
