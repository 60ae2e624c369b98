"""Latents of an autoencoder's moments, and their gradient without autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...calls import PosteriorCall
from ..interface import Backend
from .coefficients import rows


def declines(call: PosteriorCall) -> str:
    return ""


def run(call: PosteriorCall, backend: Backend) -> tuple[Tensor, Tensor | None, Any]:
    """See ``PosteriorCall``."""
    shape, device, dtype = call.shape, call.moments.device, call.scale.dtype
    z, log_variance = (half.to(dtype) for half in call.halves)
    shift, scale, alpha, sigma = rows(call.shift, call.scale, call.alpha, call.sigma)
    if call.xi is not None:
        xi = backend.materialize(call.xi, shape, device).to(dtype)
        z = z + torch.exp(0.5 * log_variance.clamp(call.least, call.most)) * xi
    if shift is not None:
        z = z - shift
    z = (z * scale).to(call.dtype)
    if call.n is None:
        return z, None, None
    n = backend.materialize(call.n, shape, device)
    x_t = (alpha * z.to(dtype) + sigma * n.to(dtype)).to(call.dtype)
    return z, x_t, n.to(dtype) if n is not call.n and call.keep_noise else call.n


def gradient(upstream: tuple[Tensor | None, Tensor | None], call: PosteriorCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    scale, alpha = rows(call.scale, call.alpha)
    dtype, (d_z, d_x_t) = scale.dtype, upstream
    terms = [] if d_z is None else [d_z.to(dtype)]
    terms += [] if d_x_t is None else [alpha * d_x_t.to(dtype)]
    by_mean = scale * sum(terms[1:], terms[0])
    log_variance = call.halves[1].to(dtype)
    by_log_variance = torch.zeros_like(by_mean)
    if call.xi is not None:
        growth = torch.exp(0.5 * log_variance.clamp(call.least, call.most))
        growth = growth * backend.materialize(call.xi, call.shape, call.moments.device).to(dtype)
        inside = (log_variance >= call.least) & (log_variance <= call.most)
        by_log_variance = torch.where(inside, 0.5 * growth * by_mean, 0.0)
    return torch.cat([by_mean, by_log_variance], 1).to(call.moments.dtype)
