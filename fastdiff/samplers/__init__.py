"""Samplers: each turns a process, a number of steps and a prediction kind into a plan, whose step table has a row of
coefficients for each call of the network.

Samplers are written for pairs of levels (alpha, sigma), so they run on every process, and x is x_t of the process
throughout. k-diffusion's Euler in x_t / alpha is DDIM in x_t, term by term; its ancestral step is DDIM with eta; no
formula divides by alpha. Where other libraries keep two results, one is kept here: Heun keeps x plus half a step along
the first slope; UniPC's corrected x is the predicted x plus a combination of x0 estimates, so the corrector folds into
the next row; churn is part of the row before it.
"""

from collections.abc import Callable
from functools import lru_cache, partial

from ..names import find, plainly
from .base import Plan, Sampler
from .corrector import PredictorCorrector
from .ddim import DDIM
from .ddpm import DDPM
from .dpm import DPMSolverPP
from .euler import Euler, EulerAncestral, FlowEuler, FlowLCM
from .heun import EDM, FlowHeun, Heun
from .lcm import LCM
from .schedule import SCHEDULES, Scheduled
from .unipc import UniPC

NAMES: dict[str, Callable[..., Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "dpmpp_1m": partial(DPMSolverPP, order=1),
    "dpmpp_2m": DPMSolverPP,
    "dpmpp_3m": partial(DPMSolverPP, order=3),
    "dpmpp_2m_sde": partial(DPMSolverPP, eta=1.0),
    "dpmpp_3m_sde": partial(DPMSolverPP, order=3, eta=1.0),
    "unipc": UniPC,
    "lcm": LCM,
    "predictor_corrector": PredictorCorrector,
    "edm": EDM,
    "flow_euler": FlowEuler,
    "flow_heun": FlowHeun,
    "flow_lcm": FlowLCM,
}
# What diffusers' classes are called here, at the defaults that both have; docs/samplers.md has the others.
_CLASSES = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "EDMEulerScheduler": "euler_karras",
    "EDMDPMSolverMultistepScheduler": "dpmpp_2m_karras",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "FlowMatchHeunDiscreteScheduler": "flow_heun",
    "FlowMatchLCMScheduler": "flow_lcm",
}
__all__ = [
    "DDIM",
    "DDPM",
    "EDM",
    "LCM",
    "NAMES",
    "DPMSolverPP",
    "Euler",
    "EulerAncestral",
    "FlowEuler",
    "FlowHeun",
    "FlowLCM",
    "Heun",
    "Plan",
    "PredictorCorrector",
    "Sampler",
    "UniPC",
    "get",
]


def get(sampler: str | Sampler) -> Sampler:
    """A sampler from its name or itself. A name may end in that of a sigma schedule: "dpmpp_2m_karras".

    Raises ValueError for an unknown name, TypeError for what is neither.
    """
    if isinstance(sampler, Sampler):
        return sampler
    if isinstance(sampler, type) and issubclass(sampler, Sampler):
        raise TypeError(f"sampler is the class {sampler.__name__}: make one, {sampler.__name__}().")
    name = sampler if isinstance(sampler, str) else type(sampler).__name__
    if name.endswith("Scheduler"):
        ours = f"write sampler={_CLASSES[name]!r}" if name in _CLASSES else f"use one of {', '.join(NAMES)}"
        raise (ValueError if isinstance(sampler, str) else TypeError)(
            f"sampler is {name} of diffusers: {ours} (docs/samplers.md says which settings are whose); or keep the "
            f"scheduler and its loop, and fuse it: fastdiff.integrations.diffusers.fuse(scheduler)."
        )
    if not isinstance(sampler, str):
        raise TypeError(f"sampler must be a name or an object of fastdiff.samplers; got {sampler!r}.")
    return _made(sampler)


@lru_cache(maxsize=64)  # they are frozen
def _made(name: str) -> Sampler:
    if name in NAMES:
        return NAMES[name]()
    base, _, schedule = plainly(name).rpartition("_")
    if schedule not in SCHEDULES or base not in NAMES:
        known = find("sampler", name, NAMES, {"euler_a": "euler_ancestral"}, "a fastdiff.samplers object")
        return known()
    if not isinstance(NAMES[base](), Scheduled):
        raise ValueError(f"sampler {name!r}: {base!r} has no sigmas to schedule; 'euler_{schedule}' has.")
    return NAMES[base](sigmas=schedule)
