"""EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, EDMEulerScheduler and FlowMatchEulerDiscreteScheduler: a row
for each step, no history, and the step index for state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....ops.step_table import DRAW, DRAW_FLOAT, ENTRY, MODEL_DTYPE
from ....process import EDM
from ....samplers.euler import euler_columns
from .. import add_noise
from ..coefficient_cache import exact, host, kind_of
from ..rows import Columns, converted, levels_and_ends
from ..source_digests import Method
from ..step import fused_step
from ..stepper import NARROW, NO_ROW, Options, Passes, Stepper

INTEGERS = frozenset({torch.int32, torch.int64})


def is_integer(timestep: Any) -> bool:
    """Whether it is what these schedulers refuse, as it may be an index that is meant for a timestep."""
    return timestep.dtype in INTEGERS if isinstance(timestep, Tensor) else isinstance(timestep, int)


def euler(sigmas: Tensor, kind: str, sigma_data: float | None = None, sign: int = 1) -> Columns:
    """Along a straight line in the space of x0 + sigma n, for ``sigmas`` [steps + 1]. The history entry is the x0
    estimate in float32."""
    alpha, sigma, end = levels_and_ends(sigmas)
    p_x, p_m = converted(kind, alpha, sigma, process=None if sigma_data is None else EDM(sigma_data))
    columns = {"p_x": p_x, "p_m": sign * p_m, "h_x": p_x, "h_m": sign * p_m}
    return columns | euler_columns(alpha, sigma, (alpha, end))


def euler_ancestral(sigmas: Tensor, kind: str) -> Columns:
    """As ``euler``, from sigmas in the scheduler's dtype. Where noise falls by much, what is left of it after the new
    noise is a rounding error, or NaN: it is taken as diffusers has it."""
    before, after = sigmas[:-1], sigmas[1:]
    up = (after**2 * (before**2 - after**2) / before**2) ** 0.5
    down = ((after**2 - up**2) ** 0.5).double()
    alpha, sigma, _ = levels_and_ends(sigmas.double())
    p_x, p_m = converted(kind, alpha, sigma)
    columns = {"p_x": p_x, "p_m": p_m, "h_x": p_x, "h_m": p_m, "c_noise": up.double()}
    return columns | euler_columns(alpha, sigma, (alpha, down))


def flow_euler(sigmas: Tensor) -> Columns:
    """x + (sigma' - sigma) velocity."""
    one, sigma, end = levels_and_ends(sigmas)
    return {"c_x": one, "c_m": end - sigma}


def flow_stochastic(sigmas: Tensor) -> Columns:
    """(1 - sigma') x0 + sigma' noise."""
    one, sigma, end = levels_and_ends(sigmas)
    return {"p_x": one, "p_m": -sigma, "c_x0": one - end, "c_noise": end}


class Euler(Stepper):
    """Returns the x0 estimate besides the new sample: in float32, or the model's output itself where it is that."""

    dtypes = NARROW
    flags = MODEL_DTYPE | ENTRY

    def make(self, scheduler: Any, config: Any) -> None:
        kind = kind_of(config, ("epsilon", "v_prediction", "sample", "original_sample"))
        self.predicts_x0 = kind == "sample"
        self.flags = MODEL_DTYPE if self.predicts_x0 else MODEL_DTYPE | ENTRY
        self.place(euler(exact(scheduler.sigmas), kind))

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        if not scheduler.is_scale_input_called:
            return "scale_model_input was not called"
        if options.get("s_churn", 0.0) != 0:
            return "s_churn"
        if is_integer(timestep):
            return "an integer for a timestep"
        k = scheduler._step_index
        if k is None:
            k = self.start(scheduler, timestep)
        return ((k, (), None, self.flags),) if k in self.usable else NO_ROW

    def finish(self, scheduler: Any, timestep: Any, x: Tensor, m: Tensor, done: tuple) -> Tensor:
        scheduler._step_index += 1
        return m if self.predicts_x0 else done[2]


class EulerAncestral(Euler):
    """Noise is drawn in every step."""

    flags = MODEL_DTYPE | ENTRY | DRAW
    predicts_x0 = False

    def make(self, scheduler: Any, config: Any) -> None:
        self.place(euler_ancestral(host(scheduler.sigmas), kind_of(config, ("epsilon", "v_prediction"))))


class EDMEuler(Euler):
    """For a network F of which the x0 estimate is c_skip x + c_out F."""

    predicts_x0 = False

    def make(self, scheduler: Any, config: Any) -> None:
        sign = 1 if kind_of(config, ("epsilon", "v_prediction")) == "epsilon" else -1
        self.place(euler(exact(scheduler.sigmas), "edm", config.sigma_data, sign))

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        if options.get("pred_original_sample") is not None:
            return "pred_original_sample was given"
        return super().locate(scheduler, x, m, timestep, t, options)


class FlowEuler(Stepper):
    """Noise is drawn with stochastic_sampling."""

    dtypes = NARROW
    folds = False  # as it is written it has diffusers' bits

    def make(self, scheduler: Any, config: Any) -> None:
        draws, sigmas = bool(config.stochastic_sampling), exact(scheduler.sigmas)
        self.flags = MODEL_DTYPE | DRAW_FLOAT if draws else MODEL_DTYPE
        self.place(flow_stochastic(sigmas) if draws else flow_euler(sigmas))

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        if options.get("per_token_timesteps") is not None:
            return "per_token_timesteps"
        if is_integer(timestep):
            return "an integer for a timestep"
        k = scheduler._step_index
        if k is None:
            k = self.start(scheduler, timestep)
        return ((k, (), None, self.flags),) if k in self.usable else NO_ROW

    def finish(self, scheduler: Any, timestep: Any, x: Tensor, m: Tensor, done: tuple) -> None:
        scheduler._step_index += 1


SCHEDULERS = {
    "EulerDiscreteScheduler": {
        "step": Method(fused_step, Euler, {"step": ("519481d6c0bb",)}),
        "add_noise": Method(add_noise.add_noise_by_sigma, add_noise.EulerNoise, add_noise.ADD_NOISE_BY_SIGMA),
        "get_velocity": Method(
            add_noise.get_velocity_by_sigma,
            add_noise.EulerNoise,
            {"get_velocity": ("9f206bf8fc42",)} | add_noise.INDEX_OF_TIMESTEP,
        ),
        "scale_model_input": Method(add_noise.scale_model_input, add_noise.InputScales, add_noise.SCALE_MODEL_INPUT),
    },
    "EulerAncestralDiscreteScheduler": {
        "step": Method(fused_step, EulerAncestral, {"step": ("5d0e28661221",)}),
        "add_noise": Method(add_noise.add_noise_by_sigma, add_noise.NoiseBySigma, add_noise.ADD_NOISE_BY_SIGMA),
        "scale_model_input": Method(add_noise.scale_model_input, add_noise.InputScales, add_noise.SCALE_MODEL_INPUT),
    },
    "EDMEulerScheduler": {
        "step": Method(fused_step, EDMEuler, {"step": ("b8e77a2e9722",), "precondition_outputs": ("f8954555e142",)}),
        "add_noise": Method(add_noise.add_noise_by_sigma, add_noise.NoiseBySigma, add_noise.ADD_NOISE_BY_SIGMA),
        "scale_model_input": Method(
            add_noise.scale_model_input,
            add_noise.EDMInputScales,
            {"scale_model_input": ("76ed6a511441",), "precondition_inputs": ("84e04abd7f6a",)},
        ),
    },
    "FlowMatchEulerDiscreteScheduler": {
        "step": Method(fused_step, FlowEuler, {"step": ("cf84927864b1", "2ec66272ad73")}),
        "scale_noise": Method(
            add_noise.scale_noise,
            add_noise.FlowNoise,
            {"scale_noise": ("a05661286bd2",)} | add_noise.INDEX_OF_TIMESTEP,
        ),
    },
}
