"""Samplers: each turns a process, a number of steps and a prediction kind into a table of coefficients, and no more."""

from .base import Plan, Sampler
from .ddim import DDIM
from .ddpm import DDPM

_NAMES = {"ddpm": DDPM, "ddim": DDIM}
__all__ = ["DDIM", "DDPM", "Plan", "Sampler", "get"]


def get(sampler: str | Sampler) -> Sampler:
    """A sampler from its name or itself. Raises ValueError for an unknown name."""
    if isinstance(sampler, str):
        if sampler not in _NAMES:
            raise ValueError(
                f"unknown sampler {sampler!r}: use one of {', '.join(_NAMES)}, or a fastdiff.samplers object."
            )
        return _NAMES[sampler]()
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be a name or an object of fastdiff.samplers; got {sampler!r}.")
    return sampler
