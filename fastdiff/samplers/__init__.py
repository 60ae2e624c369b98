"""Samplers: each turns a process, a number of steps and a prediction kind into a table of coefficients, and no more."""

from collections.abc import Callable
from functools import partial

from .base import Plan, Sampler
from .ddim import DDIM
from .ddpm import DDPM
from .dpm import DPMSolverPP
from .euler import Euler, EulerAncestral, FlowEuler, FlowLCM
from .heun import EDM, FlowHeun, Heun
from .lcm import LCM
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
    "edm": EDM,
    "flow_euler": FlowEuler,
    "flow_heun": FlowHeun,
    "flow_lcm": FlowLCM,
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
    "Sampler",
    "UniPC",
    "get",
]


def get(sampler: str | Sampler) -> Sampler:
    """A sampler from its name or itself. Raises ValueError for an unknown name."""
    if isinstance(sampler, str):
        if sampler not in NAMES:
            raise ValueError(
                f"unknown sampler {sampler!r}: use one of {', '.join(NAMES)}, or a fastdiff.samplers object."
            )
        return NAMES[sampler]()
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be a name or an object of fastdiff.samplers; got {sampler!r}.")
    return sampler
