"""Noising."""

from __future__ import annotations

from torch import Tensor

from ...calls import NoiseCall
from .coefficients import rows


def noise(call: NoiseCall, n: Tensor, xi: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x_t, n): see ``NoiseCall``; both noises are given as tensors."""
    alpha, sigma = rows(call.alpha, call.sigma)
    dtype = alpha.dtype
    seen = n.to(dtype)
    if xi is not None:
        seen = seen + call.perturbation * xi.to(dtype)
    x_t = (alpha * call.x0.to(dtype) + sigma * seen).to(call.x0.dtype)
    return x_t, n if n is call.n else n.to(dtype)
