"""What of diffusers is covered: its classes, their methods, and what those methods call that is replaced with them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import add_noise, step
from . import coefficient_cache as cache
from .source_digests import KNOWN, fingerprint

SWITCH = "set_timesteps"  # followed, so that tables are made before the first step


@dataclass(frozen=True)
class Method:
    """A method and its replacement.

    Args:
        make: (original, counted name, maker[, output class]) -> replacement.
        plan: the class of its plan, kept under ``where``.
        helpers: methods that the replacement stands for too: where one of these is overridden, it stands back.
    """

    make: Callable
    plan: type
    where: str
    helpers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Covered:
    module: str
    output: str
    methods: dict[str, Method]


def _step(make: Callable, plan: type, *helpers: str) -> Method:
    return Method(make, plan, cache.STEPS, helpers)


_BY_TIME = {
    "add_noise": Method(add_noise.add_noise_by_time, cache.NoisePlan, cache.NOISE),
    "get_velocity": Method(add_noise.get_velocity_by_time, cache.NoisePlan, cache.NOISE),
}
_INDEX = ("index_for_timestep",)


def _by_index(plan: type, *helpers: str) -> Method:
    return Method(add_noise.add_noise_by_index, plan, cache.NOISE, _INDEX + helpers)


def _input(plan: type = cache.InputPlan, *helpers: str) -> Method:
    return Method(add_noise.scale_model_input, plan, cache.INPUT, helpers)


_DDPM = {
    "step": _step(step.ddpm, cache.DDPMPlan, "previous_timestep", "_get_variance", "_threshold_sample"),
    **_BY_TIME,
}
_DDIM = {"step": _step(step.ddim, cache.DDIMPlan, "_get_variance", "_threshold_sample"), **_BY_TIME}
_SIGMAS, _MULTISTEP = cache.SigmaNoisePlan, cache.MultistepNoisePlan
_LEVELS = "_sigma_to_alpha_sigma_t"

SUPPORTED: dict[str, Covered] = {
    "DDPMScheduler": Covered("scheduling_ddpm", "DDPMSchedulerOutput", _DDPM),
    "DDPMParallelScheduler": Covered("scheduling_ddpm_parallel", "DDPMParallelSchedulerOutput", _DDPM),
    "DDIMScheduler": Covered("scheduling_ddim", "DDIMSchedulerOutput", _DDIM),
    "DDIMParallelScheduler": Covered("scheduling_ddim_parallel", "DDIMParallelSchedulerOutput", _DDIM),
    "LCMScheduler": Covered(
        "scheduling_lcm",
        "LCMSchedulerOutput",
        {
            "step": _step(step.lcm, cache.LCMPlan, "get_scalings_for_boundary_condition_discrete", "_threshold_sample"),
            **_BY_TIME,
        },
    ),
    "EulerDiscreteScheduler": Covered(
        "scheduling_euler_discrete",
        "EulerDiscreteSchedulerOutput",
        {
            "step": _step(step.euler, cache.EulerPlan),
            "add_noise": _by_index(cache.EulerNoisePlan),
            "get_velocity": Method(add_noise.get_velocity_by_index, cache.EulerNoisePlan, cache.NOISE, _INDEX),
            "scale_model_input": _input(),
        },
    ),
    "EulerAncestralDiscreteScheduler": Covered(
        "scheduling_euler_ancestral_discrete",
        "EulerAncestralDiscreteSchedulerOutput",
        {
            "step": _step(step.euler_ancestral, cache.EulerAncestralPlan),
            "add_noise": _by_index(_SIGMAS),
            "scale_model_input": _input(),
        },
    ),
    "HeunDiscreteScheduler": Covered(
        "scheduling_heun_discrete",
        "HeunDiscreteSchedulerOutput",
        {
            "step": _step(step.heun, cache.HeunPlan, "state_in_first_order"),
            "add_noise": _by_index(_SIGMAS),
            "scale_model_input": _input(cache.HeunInputPlan),
        },
    ),
    "EDMEulerScheduler": Covered(
        "scheduling_edm_euler",
        "EDMEulerSchedulerOutput",
        {
            "step": _step(step.edm_euler, cache.EDMEulerPlan, "precondition_outputs"),
            "add_noise": _by_index(_SIGMAS),
            "scale_model_input": _input(cache.EDMInputPlan, "precondition_inputs"),
        },
    ),
    "DPMSolverMultistepScheduler": Covered(
        "scheduling_dpmsolver_multistep",
        "SchedulerOutput",
        {
            "step": _step(
                step.dpm_solver,
                cache.DPMSolverPlan,
                *("convert_model_output", "dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update"),
                *("multistep_dpm_solver_third_order_update", "_threshold_sample", _LEVELS),
            ),
            "add_noise": _by_index(_MULTISTEP, _LEVELS),
        },
    ),
    "UniPCMultistepScheduler": Covered(
        "scheduling_unipc_multistep",
        "SchedulerOutput",
        {
            "step": _step(
                step.unipc,
                cache.UniPCPlan,
                *("convert_model_output", "multistep_uni_p_bh_update", "multistep_uni_c_bh_update"),
                *("_threshold_sample", _LEVELS),
            ),
            "add_noise": _by_index(_MULTISTEP, _LEVELS),
        },
    ),
    "FlowMatchEulerDiscreteScheduler": Covered(
        "scheduling_flow_match_euler_discrete",
        "FlowMatchEulerDiscreteSchedulerOutput",
        {
            "step": _step(step.flow_euler, cache.FlowEulerPlan),
            "scale_noise": Method(add_noise.scale_noise, cache.FlowNoisePlan, cache.NOISE, _INDEX),
        },
    ),
    "FlowMatchHeunDiscreteScheduler": Covered(
        "scheduling_flow_match_heun_discrete",
        "FlowMatchHeunDiscreteSchedulerOutput",
        {
            "step": _step(step.flow_heun, cache.FlowHeunPlan, "state_in_first_order"),
            "scale_noise": Method(add_noise.scale_noise_of_step, cache.FlowNoisePlan, cache.NOISE),
        },
    ),
}


def resolve(name: str) -> type | None:
    """The class of that name of the installed diffusers, or None."""
    try:
        return getattr(importlib.import_module(f"diffusers.schedulers.{SUPPORTED[name].module}"), name, None)
    except ImportError:
        return None


def own(cls: type, name: str) -> Any:
    """What ``cls`` has under that name without a replacement of ours; None if nothing."""
    found = inspect.getattr_static(cls, name, None)
    return getattr(found, "_fastdiff_original", found)


def unknown(base: type, name: str) -> str | None:
    """Why the method ``name`` of a covered class is none that the replacement was made for; None if it is one."""
    for part in (name, *SUPPORTED[base.__name__].methods[name].helpers):
        called = f"{base.__name__}.{part}"
        function = own(base, part)
        if function is None:
            return f"{called} is missing"
        found = fingerprint(function)
        if found is None:
            return f"the source of {called} is not there to be compared"
        if found not in KNOWN.get(called, ()):
            return f"{called} is none that fastdiff knows"
    return None
