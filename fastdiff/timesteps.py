"""Timestep samplers: pure functions from uniforms in (0, 1) to the times of a process (inverse distribution functions).

The uniforms come from the same counter-based generator as the noise, so t too depends on (seed, sample index) alone.
A sampler makes fractions of the process (0 clean, 1 noise), which the process turns into its own t; only LogNormal
makes sigmas, for EDM, and UniformLogSNR signal-to-noise ratios.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .names import find
from .numeric import check_fields
from .process import Process, as_float64, check_by
from .showing import brief


class Timesteps:
    """Base: ``fraction(u)`` maps float64 uniforms, [B] or [B, F], to fractions in [0, 1]."""

    def __post_init__(self):
        check_fields(self)

    def fraction(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """Times of ``process`` for uniforms ``u`` in (0, 1): int64 for discrete processes, else float64."""
        return process.time(self.fraction(as_float64(u)))


@dataclass(frozen=True)
class Uniform(Timesteps):
    """Uniform over the fractions [low, high) of the process: all of it by default.

    ``by="sigma"``, for RectifiedFlow: it is the sigma, after the shift, that is uniform over [low, high).
    """

    low: float = 0.0
    high: float = 1.0
    by: str = "fraction"

    def __post_init__(self):
        super().__post_init__()
        _part_of_the_process(self.low, self.high)
        check_by(self.by)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        if self.by == "fraction":
            return super().__call__(u, process)
        if not process.straight or process.discrete:
            raise ValueError(f"Uniform(by='sigma') draws the sigma of a RectifiedFlow; got {process!r}.")
        return process.time_of((self.low + (self.high - self.low) * as_float64(u)).clamp(min=process.sigma_min))

    def fraction(self, u: Tensor) -> Tensor:
        if (self.low, self.high) == (0.0, 1.0):
            return u
        return self.low + (self.high - self.low) * u


@dataclass(frozen=True)
class Stratified(Timesteps):
    """Low-discrepancy over the batch: (u_0 + i / B) mod 1 in place of u_i (Kingma et al. 2021, appendix I.1).

    Each t alone is distributed as by ``inner``; the t of a batch cover it evenly. Depends on the batch as a whole. Of
    several times a sample, [B, F], the t of each frame cover it by themselves: those of a sample stay independent.
    """

    inner: Timesteps = field(default_factory=Uniform)

    def __post_init__(self):
        object.__setattr__(self, "inner", _named(self.inner))

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        if not u.numel():
            return self.inner(u, process)
        u = as_float64(u)
        i = torch.arange(len(u), dtype=u.dtype, device=u.device).view(-1, *(1,) * (u.ndim - 1))
        spread = (u[:1] + i / len(u)) % 1
        # Open interval: an inner quantile function may be infinite at 0.
        return self.inner(spread.clamp(2.0**-53, 1 - 2.0**-53), process)


@dataclass(frozen=True)
class LogitNormal(Timesteps):
    """sigmoid of a normal (Esser et al. 2024, equation 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _positive("std", self.std)

    def fraction(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Mode(Timesteps):
    """1 - u - scale (cos^2(pi u / 2) - 1 + u): mass towards the middle (Esser et al. 2024, equation 20)."""

    scale: float = 1.29

    def __post_init__(self):
        super().__post_init__()
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must lie in [-1, {2 / (math.pi - 2):.4f}] (monotone there); got {self.scale!r}.")

    def fraction(self, u: Tensor) -> Tensor:
        return (1 - u - self.scale * (torch.cos(u * (math.pi / 2)) ** 2 - 1 + u)).clamp(0, 1)


@dataclass(frozen=True)
class CosMap(Timesteps):
    """1 - 1 / (tan(pi u / 2) + 1): uniform for the cosine schedule (Esser et al. 2024, equation 21)."""

    def fraction(self, u: Tensor) -> Tensor:
        return 1 - 1 / (torch.tan(u * (math.pi / 2)) + 1)


@dataclass(frozen=True)
class LogNormal(Timesteps):
    """ln(sigma / alpha) ~ N(mean, std^2).

    For EDM, whose t is that sigma (Karras et al. 2022, table 1), and for TrigFlow and Cosine (Lu and Song 2024: t =
    arctan(exp(tau) / sigma_data), tau ~ N(-1, 1.4^2)).
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        super().__post_init__()
        _positive("std", self.std)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        sigma = torch.exp(self.mean + self.std * torch.special.ndtri(as_float64(u)))
        if process.t_is_sigma:
            return sigma
        if process.discrete or process.straight or not _has_every_ratio(process):
            raise ValueError(
                f"LogNormal draws any sigma / alpha from 0 to infinity, so it goes with fastdiff.EDM, TrigFlow and "
                f"Cosine; got {process!r}."
            )
        return process.time_of(sigma)


@dataclass(frozen=True)
class UniformLogSNR(Timesteps):
    """The logarithm of the SNR is uniform between those of two fractions of a continuous process.

    It is the importance sampling of Song et al. 2021 (Maximum Likelihood Training of Score-Based Diffusion Models,
    arXiv 2101.09258): since d log SNR / dt = -g(t)^2 / sigma(t)^2, t has the density g^2 / (sigma^2 Z). So the
    likelihood weighting is the constant Z, ``normalizer``, on the error of the noise: ``error_space="epsilon"``.

    The SNR must be finite and positive at both ends: give a process that begins at t = 0 a ``t_min`` (VPSDE, SubVPSDE),
    or take other fractions.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _part_of_the_process(self.low, self.high)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        most, least = self._ends(process)
        return process.time_of(process.sigma_of_ratio(torch.exp(((most - least) * as_float64(u) - most) / 2)))

    def normalizer(self, process: Process) -> float:
        """Z, the integral of g(t)^2 / sigma(t)^2 over the times that are drawn: the difference of the ends' log SNR."""
        most, least = self._ends(process)
        return most - least

    def density(self, t: Tensor, process: Process) -> Tensor:
        """The density of the times that are drawn, at times between the ends, for a process that has
        ``diffusion_squared``: float64, of t's shape."""
        return process.diffusion_squared(t) / process.alpha_sigma(t)[1] ** 2 / self.normalizer(process)

    def _ends(self, process: Process) -> tuple[float, float]:
        """The log SNR at the fractions ``low`` and ``high``."""
        if process.discrete:
            raise ValueError(f"UniformLogSNR needs a continuous process; got {process!r}.")
        ends = torch.tensor([self.low, self.high], dtype=torch.float64, device="cpu")
        alpha, sigma = process.alpha_sigma(process.time(ends))
        most, least = (2 * (alpha.log() - sigma.log())).tolist()
        if math.isinf(most) or math.isinf(least):
            where = self.low if math.isinf(most) else self.high
            raise ValueError(
                f"the log SNR of {process!r} is infinite at the fraction {where}: use a process with a t_min, such as "
                f"VPSDE(t_min=1e-5), or UniformLogSNR(low, high) within (0, 1)."
            )
        return most, least


@dataclass(frozen=True)
class Shifted(Timesteps):
    """shift t / (1 + (shift - 1) t) of ``inner``'s fractions. For RectifiedFlow prefer its own ``shift``."""

    inner: Timesteps
    shift: float

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "inner", _named(self.inner))
        _positive("shift", self.shift)

    def fraction(self, u: Tensor) -> Tensor:
        t = self.inner.fraction(u)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        if getattr(process, "shift", 1.0) != 1.0:
            raise ValueError(f"the shift would be applied twice: {process!r} has one of its own. Use one of the two.")
        if isinstance(self.inner, Stratified):
            raise ValueError("put Stratified outside: Stratified(Shifted(inner, shift)).")
        return super().__call__(u, process)


_NAMES = {
    "uniform": Uniform,
    "stratified": Stratified,
    "logit_normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "lognormal": LogNormal,
    "uniform_log_snr": UniformLogSNR,
}


def get(timesteps: Timesteps | str | None, process: Process) -> Timesteps:
    """A sampler from its name or itself; None: LogNormal for EDM's sigmas, uniform for every other process."""
    if timesteps is None:
        return LogNormal() if process.t_is_sigma else Uniform()
    return _named(timesteps)


def _named(timesteps: Timesteps | str) -> Timesteps:
    if isinstance(timesteps, str):
        return find("timestep sampler", timesteps, _NAMES, {}, "an object")()
    if not isinstance(timesteps, Timesteps):
        hint = (
            " A function of one's own is a subclass of Timesteps with that fraction(u)."
            if callable(timesteps) and not isinstance(timesteps, type)
            else ""
        )
        raise TypeError(f"timesteps must be None, a name or a fastdiff.timesteps object; got {brief(timesteps)}.{hint}")
    return timesteps


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number; got {value!r}.")


def _has_every_ratio(process: Process) -> bool:
    """Whether sigma / alpha of a continuous process reaches from 0 to infinity."""
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device="cpu")
    alpha, sigma = process.alpha_sigma(ends)
    return sigma[0].item() == 0 and alpha[1].item() == 0


def _part_of_the_process(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"0 <= low < high <= 1 is needed; got low={low!r}, high={high!r}.")
