"""Sigma schedules: float64 [steps], falling from sigma_max to sigma_min."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def karras(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Linear in sigma^(1 / rho) (Karras et al. 2022, equation 5)."""
    ramp = _ramp(steps)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def exponential(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Linear in ln sigma."""
    return (math.log(sigma_max) + _ramp(steps) * (math.log(sigma_min) - math.log(sigma_max))).exp()


def linear(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Linear in sigma."""
    return sigma_max + _ramp(steps) * (sigma_min - sigma_max)


def beta(steps: int, sigma_min: float, sigma_max: float, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of a beta distribution: more steps at both ends (Lee et al. 2024, "Beta Sampling is All You Need")."""
    quantiles = [beta_quantile(1 - u, a, b) for u in _ramp(steps).tolist()]
    return sigma_min + (sigma_max - sigma_min) * torch.tensor(quantiles, dtype=torch.float64, device="cpu")


def _ramp(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")


def beta_quantile(u: float, a: float, b: float) -> float:
    """The x at which the distribution function of Beta(a, b) is u, by bisection."""
    if u <= 0 or u >= 1:
        return float(u >= 1)
    low, high = 0.0, 1.0
    while True:
        x = (low + high) / 2
        if x in (low, high):
            return x
        low, high = (x, high) if beta_distribution(x, a, b) < u else (low, x)


def beta_distribution(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 < x < 1, by its continued fraction (Abramowitz and Stegun,
    26.5.8), evaluated by Lentz's method on the side where it converges fast."""
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_distribution(1 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 500):
        change = 1.0
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            change = c * d
            value *= change
        if abs(change - 1) < 1e-16:
            break
    return math.exp(front) * value / a
