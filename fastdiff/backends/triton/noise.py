"""Noising on a GPU, with the target where it is wanted, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...calls import NoiseCall
from ..interface import COEFFICIENTS, Backend, differentiable
from ..layout import TOKENS, empty_in_order, order_of_tokens
from ..saving import save, saved
from . import affine
from .affine import scaled
from .arguments import in_format_of, permuted, rows_fit, too_many, unsuited


def declines(call: NoiseCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    x0, n, alpha, sigma, _, xi = call[:6]
    because = unsuited(x0.device, (x0, n, xi), (alpha, sigma), images=True)
    if not because and call.order is not None and (x0.ndim != 6 or call.order not in TOKENS.values()):
        because = "another order of x_t in memory than that of packed tokens"
    if not because and call.packed is not None:
        because = too_many(call.packed)
    return because or (COEFFICIENTS if differentiable(alpha, sigma, xi) else "")


def run(call: NoiseCall, backend: Backend) -> tuple[Tensor, Any]:
    """See ``NoiseCall``; alpha and sigma may be ``Gathered``."""
    x0, n = call.x0, call.n
    if not differentiable(x0, n):
        return _launch(call)[:2]
    x_t, kept = _Noise.apply(x0, n, call)
    return x_t, n if isinstance(n, Tensor) else kept


def noise_and_target(call: NoiseCall, p: Any, q: Any) -> tuple[Tensor, Any, Tensor] | None:
    """See ``Backend.noise_and_target``, from one launch; None where it takes two passes."""
    if declines(call) or not rows_fit(p, q) or differentiable(call.x0, call.n, p, q):
        return None
    return _launch(call, True, p, q)


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, n, call):
        save(ctx, call.alpha, call.sigma)
        ctx.packed = call.packed
        ctx.dtypes = x0.dtype, n.dtype if isinstance(n, Tensor) else None
        x_t, kept, _ = _launch(call)
        if kept is not n and isinstance(kept, Tensor):
            ctx.mark_non_differentiable(kept)
        return x_t, kept

    @staticmethod
    def backward(ctx, gradient, _):
        return (*scaled(gradient, zip(saved(ctx), ctx.dtypes, ctx.needs_input_grad[:2]), ctx.packed), None)


def _launch(call: NoiseCall, with_target: bool = False, p: Any = None, q: Any = None):
    x0, n, alpha, sigma, perturbation, xi, keep_noise = call[:7]
    shape, device = tuple(x0.shape), x0.device
    name = "none"
    if call.order is None and call.packed is None:
        order, (data, given, other), (alpha, sigma, p, q) = permuted((x0, n, xi), (alpha, sigma, p, q))
        x_t = torch.empty_like(data, dtype=call.stored)
    else:
        order, (data, given, other) = None, (t.contiguous() if isinstance(t, Tensor) else t for t in (x0, n, xi))
        x_t = empty_in_order(shape, call.order, call.stored, device)
        name = order_of_tokens(x_t)
    target = torch.empty_like(x_t) if with_target else None
    kept, z = n, None
    if keep_noise and not isinstance(n, Tensor):
        kept = z = torch.empty(shape, dtype=torch.float32, device=device)
    how = float(perturbation), other, target, p, q, name
    affine.run(tuple(data.shape), device, data, alpha, given, sigma, x_t, z, *how, packed=call.packed)
    if call.order is not None:
        return x_t, kept, target
    if order is not None:
        return x_t.permute(order), kept, target if target is None else target.permute(order)
    return in_format_of(x0, x_t), kept, None if target is None else in_format_of(x0, target)
