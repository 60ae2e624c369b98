"""DDIMScheduler and DDIMParallelScheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....ops import PreparedSteps
from ....ops.step_table import DRAW, ONE_DTYPE, X0
from ....samplers.ddim import ddim_columns
from ..add_noise import BY_TIMESTEP
from ..coefficient_cache import Unfit, host, kind_of
from ..rows import Columns, converted, estimate
from ..source_digests import Method
from ..step import fused_step
from ..stepper import NO_ROW, Options, Passes, Stepper


def columns(now: Tensor, before: Tensor, kind: str, eta: float, rederive: bool) -> Columns:
    """From alpha_bar ``now`` to alpha_bar ``before``, [rows] each, both in the scheduler's dtype. Song et al. 2021,
    equations 12 and 16. ``rederive``: the noise estimate is that of a clipped x0.

    What is left of the noise, 1 - before - variance, cancels: it is taken as diffusers has it.
    """
    variance = (1 - before) / (1 - now) * (1 - now / before)
    deviation = eta * variance**0.5
    direction = (1 - before - deviation**2) ** 0.5
    now, before = now.double(), before.double()
    alpha, sigma = now.sqrt(), (1 - now).sqrt()
    epsilon = None if rederive else converted(kind, alpha, sigma, "epsilon")
    made = ddim_columns(alpha, sigma, before.sqrt(), direction.double(), epsilon)
    return made | {"c_noise": deviation.double()} | estimate(kind, alpha, sigma)


class DDIM(Stepper):
    """A row for each timestep, in a table for each (eta, use_clipped_model_output). Noise is drawn, or given, where eta
    is above 0. There is no history and no state."""

    tensor_names = ("timesteps", "alphas_cumprod", "final_alpha_cumprod")
    other_names = ("num_inference_steps",)
    by_timestep = True

    def make(self, scheduler: Any, config: Any) -> None:
        self.kind = kind_of(config)
        self.one_dtype = self.kind == "sample"
        self.limit_x0(config)
        if scheduler.num_inference_steps is None:
            raise Unfit("set_timesteps was not called")
        self.bars, self.final = host(scheduler.alphas_cumprod), host(scheduler.final_alpha_cumprod)
        self.stride = config.num_train_timesteps // scheduler.num_inference_steps
        self.tables: dict[tuple[float, bool], tuple[PreparedSteps, frozenset[int]]] = {}
        self.choose(0.0, False)

    def choose(self, eta: float, rederive: bool) -> None:
        """Take the table of these for the step table, made if there is none yet."""
        found = self.tables.get((eta, rederive))
        if found is None:
            before = torch.arange(len(self.bars)) - self.stride
            bars = torch.where(before >= 0, self.bars[before.clamp(min=0)], self.final)
            self.place(columns(self.bars, bars, self.kind, eta, rederive))
            found = self.tables[eta, rederive] = self.table, self.usable
        self.table, self.usable = found

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        eta, noise = options.get("eta", 0.0), options.get("variance_noise")
        if not isinstance(eta, (int, float)):
            return "eta is no number"
        self.choose(eta, bool(options.get("use_clipped_model_output", False)))
        if t not in self.usable:
            return NO_ROW
        if eta <= 0:
            return ((t, (), None, X0 | ONE_DTYPE),)
        if noise is None:
            return ((t, (), None, X0 | ONE_DTYPE | DRAW),)
        if options.get("generator") is not None or not _alike(noise, x):
            return "the variance noise does not fit"
        return ((t, (), noise, X0 | ONE_DTYPE),)

    def finish(self, scheduler: Any, timestep: Any, x: Tensor, m: Tensor, done: tuple) -> Tensor:
        return done[1]


def _alike(noise: Any, x: Any) -> bool:
    if not (isinstance(noise, Tensor) and isinstance(x, Tensor)):
        return False
    return noise.shape == x.shape and noise.device == x.device and noise.dtype == x.dtype


METHODS = {
    "step": Method(
        fused_step,
        DDIM,
        {
            "step": ("669840d65e5a", "b89557667cec"),
            "_get_variance": ("12b62c5b2eed", "cb6106ca23d1"),
            "_threshold_sample": ("35d85792db7a",),
        },
    ),
    **BY_TIMESTEP,
}
SCHEDULERS = {"DDIMScheduler": METHODS, "DDIMParallelScheduler": METHODS}
