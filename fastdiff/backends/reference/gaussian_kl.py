"""The terms of the variational bound, and their gradient without autograd."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...calls import GaussianCall
from ..interface import Backend
from .coefficients import rows
from .gaussian_terms import derivatives, rho
from .loss import counts, sum_rows


def declines(call: GaussianCall) -> str:
    return ""


def run(call: GaussianCall, backend: Backend) -> Tensor:
    """See ``GaussianCall``."""
    of = _operands(call, backend)
    terms = torch.where(of.bounds, of.weight * rho(of.d, of.log_variance, of.l_q, of.half_width, of.x0), 0.0)
    e = torch.where(of.errs, of.e, 0.0)  # without a weight too: a frozen mean has a gradient, which is 0
    terms = terms + (e * e if of.simple_weight is None else of.simple_weight * (e * e))
    dtype, count = of.weight.dtype, of.weight.numel()
    sums = sum_rows(terms, of.weight.shape)
    if call.reduction == "sum":
        return sums.sum().to(dtype)
    means = sums / _elements_of_a_row(call)
    return (means.sum() / count if call.reduction == "mean" else means).to(dtype)


def gradient(upstream: Tensor, call: GaussianCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    of = _operands(call, backend)
    factor = upstream.to(torch.float32 if upstream.device.type == "mps" else torch.float64)
    if call.reduction != "sum":
        factor = factor / _elements_of_a_row(call)
        factor = factor / max(1, of.weight.numel()) if call.reduction == "mean" else factor
    factor = factor.to(of.weight.dtype)
    slopes = derivatives(of.d, of.log_variance, of.l_q, of.half_width, of.x0)
    by_prediction = torch.zeros_like(of.e)
    if not call.freeze_mean:
        by_prediction = torch.where(of.bounds, factor * of.weight * slopes.d * of.scale, 0.0)
    if of.simple_weight is not None:
        by_prediction = by_prediction + torch.where(of.errs, factor * of.simple_weight * (2 * of.e), 0.0)
    if of.l_v is None:
        return by_prediction.to(call.output.dtype)
    by_v = torch.where(of.bounds, factor * of.weight * slopes.log_variance * of.l_v, 0.0)
    return torch.cat([half.to(call.output.dtype) for half in (by_prediction, by_v)], 1)


class _Operands(NamedTuple):
    """What the formulas take; ``bounds`` and ``errs``: where rho, and e^2, count. What does not count is 0, so that it
    makes no NaN, forward or backward."""

    e: Tensor
    d: Tensor
    log_variance: Tensor
    l_q: Tensor
    half_width: Tensor | None
    x0: Tensor | None
    scale: Tensor
    l_v: Tensor | None
    weight: Tensor
    simple_weight: Tensor | None
    bounds: Tensor
    errs: Tensor


def _operands(call: GaussianCall, backend: Backend) -> _Operands:
    (prediction, v), n = call.halves, None
    if call.q is not None:
        n = backend.materialize(call.n, call.shape, call.output.device)
    p, q, scale, l_0, l_v, l_q, half_width, weight, simple_weight = rows(*call[3:12])
    dtype = weight.dtype
    x0 = None if call.x0 is None else call.x0.to(dtype)
    target: Any = 0.0
    if p is not None:
        target = p * x0
    if q is not None:
        target = target + q * n.to(dtype)
    bounds = counts(weight)
    errs = torch.zeros_like(bounds) if simple_weight is None else counts(simple_weight)

    def error(prediction: Tensor) -> Tensor:
        return torch.where(bounds | errs, prediction.to(dtype) - target, 0.0)

    e = error(prediction)
    scale, l_0, l_q = (torch.where(bounds, row, 0.0) for row in (scale, l_0, l_q))
    d = scale * torch.where(bounds, error(prediction.detach()) if call.freeze_mean else e, 0.0)
    log_variance = l_0
    if v is not None:
        l_v = torch.where(bounds, l_v, 0.0)
        log_variance = l_0 + l_v * torch.where(bounds, v.to(dtype), 0.0)
    x0 = None if half_width is None else x0
    return _Operands(e, d, log_variance, l_q, half_width, x0, scale, l_v, weight, simple_weight, bounds, errs)


def _elements_of_a_row(call: GaussianCall) -> float:
    return float(math.prod(call.shape) // max(1, call.weight.numel()))
