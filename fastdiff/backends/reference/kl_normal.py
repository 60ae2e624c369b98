"""The KL divergence from the standard normal distribution, and its gradient without autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...calls import KLNormalCall
from ..interface import Backend
from .coefficients import rows
from .gaussian_terms import derivatives, rho
from .loss import counts, sum_rows


def declines(call: KLNormalCall) -> str:
    return ""


def run(call: KLNormalCall, backend: Backend) -> Tensor:
    """See ``KLNormalCall``. It is the divergence of two Gaussians whose means differ by the mean, of which the second
    has the log-variance 0."""
    (weight,) = rows(call.weight)
    kept, mean, log_variance = _operands(call, weight)
    log_variance = log_variance.clamp(call.least, call.most)
    terms = torch.where(kept, rho(mean, torch.zeros_like(mean), log_variance, None, None), 0.0)
    sums = weight * sum_rows(terms, weight.shape)
    if call.reduction == "sum":
        return sums.sum().to(weight.dtype)
    means = sums / _elements_of_a_row(call)
    return (means.sum() / weight.numel() if call.reduction == "mean" else means).to(weight.dtype)


def gradient(upstream: Tensor, call: KLNormalCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    (weight,) = rows(call.weight)
    kept, mean, log_variance = _operands(call, weight)
    factor = upstream * sum_rows(weight, weight.shape)
    if call.reduction != "sum":
        factor = factor / _elements_of_a_row(call)
        factor = factor / max(1, weight.numel()) if call.reduction == "mean" else factor
    inside = (log_variance >= call.least) & (log_variance <= call.most)
    clamped = log_variance.clamp(call.least, call.most)
    slopes = derivatives(mean, torch.zeros_like(mean), clamped, None, None)
    factor = factor.to(weight.dtype)
    halves = (kept, slopes.d), (kept & inside, slopes.l_q)
    return torch.cat([torch.where(where, factor * slope, 0.0) for where, slope in halves], 1).to(call.moments.dtype)


def _operands(call: KLNormalCall, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(where a term counts, the means, the log-variances); what does not count is 0, so that it makes no NaN."""
    kept = counts(weight)
    return kept, *(torch.where(kept, half.to(weight.dtype), 0.0) for half in call.halves)


def _elements_of_a_row(call: KLNormalCall) -> float:
    return float(math.prod(call.shape) // max(1, call.weight.numel()))
