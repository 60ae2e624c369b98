"""Noising as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends.interface import COEFFICIENTS, Backend, differentiable
from ...backends.layout import empty_in_order
from ...calls import NoiseCall
from .declaring import PACKED, PARTS, affine_gradient, declare, noise_arguments, packed_of, parts, source, strided
from .declaring import run as runs


def _x_t(x0: Tensor, dtype: torch.dtype | None, order: list[int] | None) -> Tensor:
    if order is None:
        return torch.empty_like(x0, dtype=dtype)
    return empty_in_order(x0.shape, tuple(order), dtype or x0.dtype, x0.device)


def _fake(x0, *arguments):
    made = arguments[0] is None and arguments[-5]
    x_t, alpha = _x_t(x0, *arguments[-4:-2]), arguments[PARTS]
    return x_t, x0.new_empty(x0.shape if made else (0,), dtype=alpha.dtype)


@declare(
    "noise",
    f"(Tensor x0, {noise_arguments('n')}, Tensor alpha, Tensor sigma, float perturbation, {noise_arguments('xi')}, "
    f"bool keep, ScalarType? dtype, int[]? order, {PACKED}) -> (Tensor, Tensor)",
    _fake,
)
def _noise(x0, *arguments):
    n, (alpha, sigma, perturbation, *others) = source(arguments)
    xi, (keep, dtype, order, *packed) = source(others)
    x_t, kept = runs(NoiseCall(x0, n, alpha, sigma, perturbation, xi, keep, dtype, order, packed_of(*packed)), x0)
    # A result must not be an argument.
    return x_t if order else strided(x_t, x0), kept if kept is not n else x0.new_empty(0, dtype=alpha.dtype)


def _context(ctx, inputs, output):
    x0, n = inputs[:2]
    *_, starts, ctx.dim = inputs
    ctx.save_for_backward(*inputs[1 + PARTS : 3 + PARTS], starts)  # alpha, sigma
    ctx.others = len(inputs) - 2
    ctx.dtypes = x0.dtype, n if n is None else n.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream, _):
    alpha, sigma, starts = ctx.saved_tensors
    packed = packed_of(starts, ctx.dim)
    d_x0 = affine_gradient(upstream, alpha, ctx.dtypes[0], packed) if ctx.needs_input_grad[0] else None
    d_n = affine_gradient(upstream, sigma, ctx.dtypes[1], packed) if ctx.needs_input_grad[1] else None
    return d_x0, d_n, *(None,) * ctx.others


torch.library.register_autograd("fastdiff::noise", _backward, setup_context=_context)


def declines(call: NoiseCall) -> str:
    return COEFFICIENTS if differentiable(call.alpha, call.sigma, call.xi) else ""


def run(call: NoiseCall, backend: Backend) -> tuple[Tensor, Any]:
    x0, n, alpha, sigma, perturbation, xi, keep, dtype, order, packed = call
    made, other = parts(n, x0.device), parts(xi, x0.device)
    how = keep, dtype, order, *(packed or (None, None))
    x_t, kept = torch.ops.fastdiff.noise(x0, *made, alpha, sigma, float(perturbation), *other, *how)
    return x_t, n if isinstance(n, Tensor) or not keep else kept
