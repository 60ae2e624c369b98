"""HeunDiscreteScheduler and FlowMatchHeunDiscreteScheduler: two calls a step, but for the last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....ops.step_table import ENTRY, MODEL_DTYPE, ONE_DTYPE, X0
from ....samplers.euler import euler_columns
from ....tensors import cached
from .. import add_noise
from ..coefficient_cache import exact, kind_of
from ..rows import Columns, estimate, levels_and_ends
from ..source_digests import Method
from ..step import fused_step
from ..stepper import NARROW, NO_ROW, Options, Passes, Stepper
from .euler import flow_euler, is_integer


def heun(sigmas: Tensor, kind: str) -> tuple[Columns, Columns]:
    """The columns of a step's (first, second) call, [steps] each, by the index of the call, for sigmas [steps + 1]. The
    history entry of the first is the slope. The history of the second: where the step began, and that slope."""
    alpha, sigma, end = levels_and_ends(sigmas)
    first = estimate(kind, alpha, sigma) | euler_columns(alpha, sigma, (alpha, end))
    first |= {"h_x": 1 / sigma, "h_x0": -1 / sigma}
    half = half_steps(sigma)
    second = estimate(kind, alpha, sigma) | {"c_h1": alpha, "c_h2": half, "c_x": half / sigma, "c_x0": -half / sigma}
    return first, second


def flow_heun(sigmas: Tensor) -> tuple[Columns, Columns]:
    """As ``heun``, for velocities."""
    one, sigma, _ = levels_and_ends(sigmas)
    half = half_steps(sigma)
    return flow_euler(sigmas) | {"h_m": one}, {"c_h1": one, "c_h2": half, "c_m": half}


def half_steps(sigma: Tensor) -> Tensor:
    """Half the difference of each sigma, [steps], to the one before; NaN for the first."""
    return torch.cat([torch.full_like(sigma[:1], torch.nan), sigma.diff()]) / 2


class Heun(Stepper):
    """The rows of first calls, then those of second calls. The scheduler keeps between the two calls where the step
    began, the slope there, and the size of the step ``dt``, which is None before a first call."""

    one_dtype = True
    kept_dtype: torch.dtype | None = None  # of what is kept; None: that of the sample
    first_flags, second_flags = X0 | ENTRY | ONE_DTYPE, X0 | ONE_DTYPE

    def make(self, scheduler: Any, config: Any) -> None:
        self.limit_x0(config)
        self.place(*self.calls(exact(scheduler.sigmas), config))
        self.sigmas, self.count = scheduler.sigmas, len(scheduler.sigmas) - 1
        self.sizes: dict[int, Tensor] = {}

    def calls(self, sigmas: Tensor, config: Any) -> tuple[Columns, Columns]:
        return heun(sigmas, kind_of(config))

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        k = scheduler._step_index
        if k is None:
            k = self.start(scheduler, timestep)
        if scheduler.dt is None:
            return ((k, (), None, self.first_flags),) if k < self.count and k in self.usable else NO_ROW
        if scheduler.dt is not self.sizes.get(k - 1):
            return "the first call of this step was not fused"
        begin, slope = scheduler.sample, scheduler.prev_derivative
        if getattr(begin, "dtype", None) is not (self.kept_dtype or getattr(x, "dtype", None)):
            return "the sample has changed in dtype"
        if k >= self.count or k + self.count not in self.usable:
            return NO_ROW
        return ((k + self.count, (begin, slope), None, self.second_flags),)

    def finish(self, scheduler: Any, timestep: Any, x: Tensor, m: Tensor, done: tuple) -> Tensor | None:
        if scheduler.dt is None:
            k, dtype = scheduler._step_index, self.kept_dtype or x.dtype
            scheduler.prev_derivative, scheduler.sample = done[2].to(dtype), x.to(dtype)
            # One tensor for each step, by which ``locate`` finds that the first call was fused.
            scheduler.dt = cached(self.sizes, k, lambda: self.sigmas[k + 1] - self.sigmas[k])
        else:
            scheduler.prev_derivative = scheduler.dt = scheduler.sample = None
        scheduler._step_index += 1
        return done[1]


class FlowHeun(Heun):
    dtypes, one_dtype = NARROW, False
    kept_dtype = torch.float32
    first_flags, second_flags = MODEL_DTYPE | ENTRY, MODEL_DTYPE

    def calls(self, sigmas: Tensor, config: Any) -> tuple[Columns, Columns]:
        return flow_heun(sigmas)

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        if "dt" not in scheduler.__dict__:
            return "set_timesteps was not called"
        if options.get("s_churn", 0.0) != 0:
            return "s_churn"
        if is_integer(timestep):
            return "an integer for a timestep"
        return super().locate(scheduler, x, m, timestep, t, options)


SCHEDULERS = {
    "HeunDiscreteScheduler": {
        "step": Method(fused_step, Heun, {"step": ("88b1aff5cff9",), "state_in_first_order": ("fceeb10fd52d",)}),
        "add_noise": Method(add_noise.add_noise_by_sigma, add_noise.NoiseBySigma, add_noise.ADD_NOISE_BY_SIGMA),
        "scale_model_input": Method(
            add_noise.scale_model_input, add_noise.HeunInputScales, {"scale_model_input": ("975bb1a2613e",)}
        ),
    },
    "FlowMatchHeunDiscreteScheduler": {
        "step": Method(fused_step, FlowHeun, {"step": ("0f19d583856a",), "state_in_first_order": ("fceeb10fd52d",)}),
        "scale_noise": Method(add_noise.scale_noise_of_step, add_noise.FlowNoise, {"scale_noise": ("9e48ee4f0e78",)}),
    },
}
