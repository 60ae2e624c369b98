"""Continuous processes of which g(t)^2 is known: the SDEs of Song et al. 2021, TrigFlow and the cosine process."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .numeric import check_numbers
from .process import Levels, Process, as_float64


class VPSDE(Process):
    """The continuous variance-preserving SDE (Song et al. 2021, equation 33).

    Args:
        beta_min, beta_max: beta(t) at t = 0 and at t = 1.
        t_min: where time begins, in [0, 1): no smaller t is drawn, none is accepted, and the last step of a sampler
            starts there. 0 (the default) draws all of [0, 1], and samplers make their last step from 1e-3.
        data_at: 1 for a t that runs from noise, 0, to data, 1 (SiT's "VP"): 1 - t takes the place of t, in beta(t) too.
            It goes with ``t_min=0``.
    """

    variance_preserving = True

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 0.0, data_at: int = 0):
        check_numbers(beta_min=beta_min, beta_max=beta_max)
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"0 < beta_min <= beta_max is needed; got {beta_min!r} and {beta_max!r}.")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        self._begin(t_min)
        self._end(data_at)
        if t_min and data_at:
            raise ValueError(f"t_min is the least t of a process whose data is at 0; got t_min={t_min!r}, data_at=1.")

    def _log_alpha(self, t: Tensor) -> Tensor:
        t = self._turned(as_float64(t))
        return -t * (t * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def grid(self, steps: int) -> Tensor:
        return self._turned(torch.linspace(1, self.t_min or 1e-3, steps, dtype=torch.float64, device="cpu"))

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2 of the SDE dx = f dt + g dw, float64."""
        return self.beta_min + self._turned(as_float64(t)) * (self.beta_max - self.beta_min)

    def _time_at(self, sigma: Tensor) -> Tensor:
        # The positive root of (b1 - b0) t^2 / 4 + b0 t / 2 = -ln alpha, in the form that does not cancel.
        log = self._minus_log_alpha_at(sigma)
        root = (self.beta_min**2 / 4 + (self.beta_max - self.beta_min) * log).sqrt()
        return self._turned(2 * log / (self.beta_min / 2 + root))

    def _minus_log_alpha_at(self, sigma: Tensor) -> Tensor:
        """-ln alpha where sigma / alpha is ``sigma``; log1p keeps the digits of a small one."""
        return torch.log1p(sigma**2) / 2


class SubVPSDE(VPSDE):
    """The sub-VP SDE: VPSDE's mean with sigma = 1 - alpha^2 (Song et al. 2021, equation 34).

    Args: those of ``VPSDE``.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        return super().diffusion_squared(t) * -torch.expm1(4 * self._log_alpha(t))

    def _alpha_sigma_at(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        alpha = 2 / (sigma + (sigma**2 + 4).sqrt())  # of alpha^2 + sigma alpha = 1
        return alpha, sigma * alpha

    def _minus_log_alpha_at(self, sigma: Tensor) -> Tensor:
        half = sigma / 2
        return torch.log1p(half + half**2 / (1 + (1 + half**2).sqrt()))


class VESDE(Process):
    """The variance-exploding SDE: x0 + sigma n, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, equation
    31).

    Args:
        sigma_min, sigma_max: sigma at t = 0 and at t = 1.
        t_min: as of ``VPSDE``; with 0 samplers make their last step from 1e-5.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 0.0):
        check_numbers(sigma_min=sigma_min, sigma_max=sigma_max)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed; got {sigma_min!r} and {sigma_max!r}.")
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self._begin(t_min)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_float64(t)
        return torch.ones_like(t), self.sigma_min * (t * math.log(self.sigma_max / self.sigma_min)).exp()

    def grid(self, steps: int) -> Tensor:
        return torch.linspace(1, self.t_min or 1e-5, steps, dtype=torch.float64, device="cpu")

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2 of the SDE dx = g dw, float64."""
        return self.alpha_sigma(t)[1] ** 2 * (2 * math.log(self.sigma_max / self.sigma_min))

    def model_time(self, levels: Levels) -> Tensor:
        return levels.sigma

    def _time_at(self, sigma: Tensor) -> Tensor:
        return (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)


class TrigFlow(Process):
    """x_t = cos(t) x0 + sigma_data sin(t) n, t in [0, pi / 2] (Lu and Song 2024, arXiv 2410.11081).

    ``sigma_data`` is the standard deviation of the data; x_t has it at every t. The SNR at pi / 2 is exactly 0: there
    "epsilon" and "score" do not determine x0, so with them samplers need timesteps that begin later.
    """

    t_max = math.pi / 2

    def __init__(self, sigma_data: float = 0.5):
        check_numbers(sigma_data=sigma_data)
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive; got {sigma_data!r}.")
        self.sigma_data = float(sigma_data)

    @property
    def _rate(self) -> float:
        """The angle a unit of t."""
        return math.pi / 2 / self.t_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_float64(t)
        # A sine of what is left, as the cosine of the float64 number pi / 2 is not 0.
        rest = (self.t_max - t).clamp(min=0)
        t, rest = (rest, t) if self.data_at else (t, rest)
        return torch.sin(rest * self._rate), self.sigma_data * torch.sin(t * self._rate)

    def grid(self, steps: int) -> Tensor:
        return self._turned(torch.linspace(self.t_max, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1])

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2 of the SDE dx = f dt + g dw, float64; infinite at the last t."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * self._rate * self.sigma_data * sigma / alpha

    def _alpha_sigma_at(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.sigma_data / torch.hypot(sigma, torch.full_like(sigma, self.sigma_data))
        return alpha, sigma * alpha

    def _time_at(self, sigma: Tensor) -> Tensor:
        return self._turned(torch.atan(sigma / self.sigma_data) / self._rate)


class Cosine(TrigFlow):
    """The continuous cosine process: alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in [0, 1] (Salimans and Ho 2022).
    It is ``TrigFlow(sigma_data=1.0)`` with another unit of time. The SNR at t = 1 is exactly 0.

    Args:
        data_at: 1 for a t that runs from noise, 0, to data, 1 (SiT's "GVP"): 1 - t takes the place of t. See
            ``RectifiedFlow``.
    """

    t_max = 1.0
    variance_preserving = True
    sigma_data = 1.0

    def __init__(self, data_at: int = 0):
        self._end(data_at)
