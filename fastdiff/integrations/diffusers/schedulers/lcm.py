"""LCMScheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....ops.step_table import DRAW, ENTRY, ONE_DTYPE, X0
from ....samplers.lcm import lcm_columns
from ..add_noise import BY_TIMESTEP
from ..coefficient_cache import Unfit, host, kind_of
from ..rows import Columns, estimate
from ..source_digests import Method
from ..step import fused_step
from ..stepper import NO_ROW, Options, Passes, Stepper


def columns(now: Tensor, before: Tensor, t: Tensor, last: Tensor, kind: str, scaling: float, clips: bool) -> Columns:
    """From alpha_bar ``now`` to alpha_bar ``before``, at the timesteps ``t``, [rows] each. ``last``, bool [rows], is
    True for the step to clean data. Luo et al. 2023, algorithm 3.

    What is returned besides the new sample is c_out x0 + c_skip x: the history entry or, where nothing is clipped, the
    x0 estimate itself.
    """
    now, before, denoised = now.double(), before.double(), lcm_columns(1.0, t, scaling, 0.5)
    skip, out = denoised["c_x"], denoised["c_x0"]
    factor, noise = torch.where(last, 1.0, before.sqrt()), torch.where(last, 0.0, (1 - before).sqrt())
    made = estimate(kind, now.sqrt(), (1 - now).sqrt()) | {"c_noise": noise}
    if clips:
        return made | {"h_x": skip, "h_x0": out, "c_x": factor * skip, "c_x0": factor * out}
    made |= {"p_x": skip + out * made["p_x"], "p_m": out * made["p_m"]}
    return made | {"c_x0": factor}


class LCM(Stepper):
    """A row for each step. Noise is drawn but in the last step. There is no history; the step index is the state."""

    tensor_names = ("timesteps", "alphas_cumprod", "final_alpha_cumprod")
    other_names = ("num_inference_steps",)
    by_timestep = True
    noise_as_result = True

    def make(self, scheduler: Any, config: Any) -> None:
        kind = kind_of(config)
        self.one_dtype = kind == "sample"
        self.limit_x0(config)
        self.clips = self.clip is not None or self.quantile is not None
        bars, count = host(scheduler.alphas_cumprod), len(self.times)
        now, before = self.host_times, torch.cat([self.host_times[1:], self.host_times[-1:]])
        if scheduler.num_inference_steps is None:
            raise Unfit("set_timesteps was not called")
        if not bool(((now >= 0) & (now < len(bars))).all()):
            raise Unfit("timesteps beyond the schedule")
        last = torch.arange(count) == scheduler.num_inference_steps - 1
        self.draws = (~last).tolist()
        self.place(columns(bars[now], bars[before], now, last, kind, config.timestep_scaling, self.clips))

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        k = scheduler._step_index
        if k is None:
            k = self.start(scheduler, timestep)
        if k not in self.usable:
            return NO_ROW
        if t != self.times[k]:
            return "the timestep is not that of the step index"
        flags = ENTRY | ONE_DTYPE if self.clips else X0 | ONE_DTYPE
        return ((k, (), None, flags | DRAW if self.draws[k] else flags),)

    def finish(self, scheduler: Any, timestep: Any, x: Tensor, m: Tensor, done: tuple) -> Tensor:
        scheduler._step_index += 1
        return done[2].to(done[0].dtype) if self.clips else done[1]


SCHEDULERS = {
    "LCMScheduler": {
        "step": Method(
            fused_step,
            LCM,
            {
                "step": ("e3fe8fc4925e",),
                "get_scalings_for_boundary_condition_discrete": ("95f54a1a1920",),
                "_threshold_sample": ("35d85792db7a",),
            },
        ),
        **BY_TIMESTEP,
    }
}
