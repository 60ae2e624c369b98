"""The stochastic differential equations of Song et al. 2021 as processes."""

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
    """

    variance_preserving = True

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 0.0):
        check_numbers(beta_min=beta_min, beta_max=beta_max)
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"0 < beta_min <= beta_max is needed; got {beta_min!r} and {beta_max!r}.")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        self._begin(t_min)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t * (t * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(as_float64(t))
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def grid(self, steps: int) -> Tensor:
        return torch.linspace(1, self.t_min or 1e-3, steps, dtype=torch.float64, device="cpu")

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2 of the SDE dx = f dt + g dw, float64."""
        return self.beta_min + as_float64(t) * (self.beta_max - self.beta_min)

    def _time_at(self, sigma: Tensor) -> Tensor:
        # The positive root of (b1 - b0) t^2 / 4 + b0 t / 2 = -ln alpha, in the form that does not cancel.
        log = self._minus_log_alpha_at(sigma)
        return 2 * log / (self.beta_min / 2 + (self.beta_min**2 / 4 + (self.beta_max - self.beta_min) * log).sqrt())

    def _minus_log_alpha_at(self, sigma: Tensor) -> Tensor:
        """-ln alpha where sigma / alpha is ``sigma``; log1p keeps the digits of a small one."""
        return torch.log1p(sigma**2) / 2


class SubVPSDE(VPSDE):
    """The sub-VP SDE: VPSDE's mean with sigma = 1 - alpha^2 (Song et al. 2021, equation 34).

    Args: those of ``VPSDE``.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(as_float64(t))
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        return super().diffusion_squared(t) * -torch.expm1(4 * self._log_alpha(as_float64(t)))

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
