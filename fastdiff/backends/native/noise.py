"""Noising on the CPU, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...calls import NoiseCall, made_from
from ...torch_access import _C
from ..interface import COEFFICIENTS, Backend, differentiable
from ..layout import empty_in_order
from ..saving import save, saved
from .launch import arrange, contiguous, empty, in_format_of, memory, source, unsuited


def declines(call: NoiseCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    x0, n, alpha, sigma, _, xi = call[:6]
    because = unsuited(x0, n, *made_from(n), alpha, sigma, xi, *made_from(xi))
    return because or (COEFFICIENTS if differentiable(alpha, sigma, xi) else "")


def run(call: NoiseCall, backend: Backend) -> tuple[Tensor, Any]:
    """See ``NoiseCall``."""
    x0, n = call.x0, call.n
    if not differentiable(x0, n):
        return _launch(call)
    x_t, kept = _Noise.apply(x0, n, call)
    return x_t, n if isinstance(n, Tensor) else kept


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, n, call):
        save(ctx, call.alpha, call.sigma)
        ctx.packed = call.packed
        ctx.dtypes = x0.dtype, n.dtype if isinstance(n, Tensor) else None
        x_t, kept = _launch(call)
        if kept is not n and isinstance(kept, Tensor):
            ctx.mark_non_differentiable(kept)
        return x_t, kept

    @staticmethod
    def backward(ctx, gradient, _):
        alpha, sigma = saved(ctx)
        if ctx.packed is not None:
            alpha, sigma = (ctx.packed.spread(row, gradient.shape) for row in (alpha, sigma))
        wide = gradient.to(alpha.dtype)
        d_x0 = (alpha * wide).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        d_n = (sigma * wide).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return d_x0, d_n, None


def _launch(call: NoiseCall) -> tuple[Tensor, Any]:
    x0, n, alpha, sigma, perturbation, xi, keep_noise = call[:7]
    shape = x0.shape
    layout, (a, s) = arrange(shape, alpha, sigma, packed=call.packed)
    order, kept = call.order, n
    x_t = empty(shape, call.stored, x0) if order is None else empty_in_order(shape, order, call.stored, x0.device)
    if keep_noise and not isinstance(n, Tensor):
        kept = empty(shape, alpha.dtype, x0)
    # What is pointed at must be held until the call returns.
    data, given, xi = contiguous(x0), contiguous(n), contiguous(xi)
    _C.noise(
        layout,
        memory(data),
        memory(a),
        memory(s),
        source(given),
        float(perturbation),
        source(xi),
        memory(x_t),
        None if kept is n else memory(kept),
        None if order is None else (tuple(shape), x_t.stride()),
        torch.get_num_threads(),
    )
    return x_t if order is not None else in_format_of(x0, x_t), kept
