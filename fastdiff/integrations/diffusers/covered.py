"""What of diffusers is covered: its classes, their methods, and what those methods call that is replaced with them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import noising, plans, stepping
from .known import KNOWN, fingerprint

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
    return Method(make, plan, plans.STEPS, helpers)


_BY_TIME = {
    "add_noise": Method(noising.add_noise_by_time, plans.NoisePlan, plans.NOISE),
    "get_velocity": Method(noising.get_velocity_by_time, plans.NoisePlan, plans.NOISE),
}
_INDEX = ("index_for_timestep",)


def _by_index(plan: type, *helpers: str) -> Method:
    return Method(noising.add_noise_by_index, plan, plans.NOISE, _INDEX + helpers)


def _input(plan: type = plans.InputPlan, *helpers: str) -> Method:
    return Method(noising.scale_model_input, plan, plans.INPUT, helpers)


_DDPM = {
    "step": _step(stepping.ddpm, plans.DDPMPlan, "previous_timestep", "_get_variance", "_threshold_sample"),
    **_BY_TIME,
}
_DDIM = {"step": _step(stepping.ddim, plans.DDIMPlan, "_get_variance", "_threshold_sample"), **_BY_TIME}
_SIGMAS, _MULTISTEP = plans.SigmaNoisePlan, plans.MultistepNoisePlan
_LEVELS = "_sigma_to_alpha_sigma_t"

COVERED: dict[str, Covered] = {
    "DDPMScheduler": Covered("scheduling_ddpm", "DDPMSchedulerOutput", _DDPM),
    "DDPMParallelScheduler": Covered("scheduling_ddpm_parallel", "DDPMParallelSchedulerOutput", _DDPM),
    "DDIMScheduler": Covered("scheduling_ddim", "DDIMSchedulerOutput", _DDIM),
    "DDIMParallelScheduler": Covered("scheduling_ddim_parallel", "DDIMParallelSchedulerOutput", _DDIM),
    "LCMScheduler": Covered(
        "scheduling_lcm",
        "LCMSchedulerOutput",
        {
            "step": _step(
                stepping.lcm, plans.LCMPlan, "get_scalings_for_boundary_condition_discrete", "_threshold_sample"
            ),
            **_BY_TIME,
        },
    ),
    "EulerDiscreteScheduler": Covered(
        "scheduling_euler_discrete",
        "EulerDiscreteSchedulerOutput",
        {
            "step": _step(stepping.euler, plans.EulerPlan),
            "add_noise": _by_index(plans.EulerNoisePlan),
            "get_velocity": Method(noising.get_velocity_by_index, plans.EulerNoisePlan, plans.NOISE, _INDEX),
            "scale_model_input": _input(),
        },
    ),
    "EulerAncestralDiscreteScheduler": Covered(
        "scheduling_euler_ancestral_discrete",
        "EulerAncestralDiscreteSchedulerOutput",
        {
            "step": _step(stepping.euler_ancestral, plans.EulerAncestralPlan),
            "add_noise": _by_index(_SIGMAS),
            "scale_model_input": _input(),
        },
    ),
    "HeunDiscreteScheduler": Covered(
        "scheduling_heun_discrete",
        "HeunDiscreteSchedulerOutput",
        {
            "step": _step(stepping.heun, plans.HeunPlan, "state_in_first_order"),
            "add_noise": _by_index(_SIGMAS),
            "scale_model_input": _input(plans.HeunInputPlan),
        },
    ),
    "EDMEulerScheduler": Covered(
        "scheduling_edm_euler",
        "EDMEulerSchedulerOutput",
        {
            "step": _step(stepping.edm_euler, plans.EDMEulerPlan, "precondition_outputs"),
            "add_noise": _by_index(_SIGMAS),
            "scale_model_input": _input(plans.EDMInputPlan, "precondition_inputs"),
        },
    ),
    "DPMSolverMultistepScheduler": Covered(
        "scheduling_dpmsolver_multistep",
        "SchedulerOutput",
        {
            "step": _step(
                stepping.dpm_solver,
                plans.DPMSolverPlan,
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
                stepping.unipc,
                plans.UniPCPlan,
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
            "step": _step(stepping.flow_euler, plans.FlowEulerPlan),
            "scale_noise": Method(noising.scale_noise, plans.FlowNoisePlan, plans.NOISE, _INDEX),
        },
    ),
    "FlowMatchHeunDiscreteScheduler": Covered(
        "scheduling_flow_match_heun_discrete",
        "FlowMatchHeunDiscreteSchedulerOutput",
        {
            "step": _step(stepping.flow_heun, plans.FlowHeunPlan, "state_in_first_order"),
            "scale_noise": Method(noising.scale_noise_of_step, plans.FlowNoisePlan, plans.NOISE),
        },
    ),
}


def resolve(name: str) -> type | None:
    """The class of that name of the installed diffusers, or None."""
    try:
        return getattr(importlib.import_module(f"diffusers.schedulers.{COVERED[name].module}"), name, None)
    except ImportError:
        return None


def own(cls: type, name: str) -> Any:
    """What ``cls`` has under that name without a replacement of ours; None if nothing."""
    found = inspect.getattr_static(cls, name, None)
    return getattr(found, "_fastdiff_original", found)


def unknown(base: type, name: str) -> str | None:
    """Why the method ``name`` of a covered class is none that the replacement was made for; None if it is one."""
    for part in (name, *COVERED[base.__name__].methods[name].helpers):
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
