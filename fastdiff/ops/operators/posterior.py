"""Latents of moments, and their gradient, as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends.interface import COEFFICIENTS, Backend, able, differentiable
from ...backends.registry import get
from ...calls import PosteriorCall
from .declaring import PARTS, declare, keep_arguments, kept_arguments, noise_arguments, parts, source, strided
from .declaring import run as runs

_ARGUMENTS = (
    f"Tensor moments, {noise_arguments('xi')}, Tensor? shift, Tensor scale, {noise_arguments('n')}, Tensor? alpha, "
    "Tensor? sigma, float least, float most, ScalarType dtype, bool keep"
)


def _call(moments: Tensor, *arguments: Any) -> PosteriorCall:
    xi, (shift, scale, *others) = source(arguments)
    n, others = source(others)
    return PosteriorCall(moments, xi, shift, scale, n, *others)


def _fake(moments, *arguments):
    scale, given, seed = arguments[PARTS + 1 : PARTS + 4]
    alpha, _, _, _, dtype, keep = arguments[2 * PARTS + 2 :]
    z = torch.empty_like(moments.chunk(2, 1)[0], dtype=dtype, memory_format=torch.contiguous_format)
    kept = z.shape if given is None and seed is not None and keep else (0,)
    return z, z.new_empty((0,) if alpha is None else z.shape), z.new_empty(kept, dtype=scale.dtype)


@declare("posterior", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _fake)
def _posterior(moments, *arguments):
    call = _call(moments, *arguments)
    z, x_t, kept = runs(call, moments)
    made = kept is not call.n and isinstance(kept, Tensor)  # a result must not be an argument
    x_t = z.new_empty(0) if x_t is None else x_t.contiguous()
    return z.contiguous(), x_t, kept if made else z.new_empty(0, dtype=call.scale.dtype)


def _fake_gradient(d_z, d_x_t, moments, *arguments):
    return torch.empty_like(moments)


@declare("posterior_gradient", f"(Tensor? d_z, Tensor? d_x_t, {_ARGUMENTS}) -> Tensor", _fake_gradient)
def _posterior_gradient(d_z, d_x_t, moments, *arguments):
    call = _call(moments, *arguments)
    return strided(able(get(moments.device), call).gradient((d_z, d_x_t), call), moments)


def _context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    keep_arguments(ctx, inputs, output)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, d_z, d_x_t, _):
    arguments = kept_arguments(ctx)
    if arguments[2 * PARTS + 3] is None:
        d_x_t = None  # there is no x_t
    d_moments = None
    if ctx.needs_input_grad[0] and not (d_z is None and d_x_t is None):
        d_moments = torch.ops.fastdiff.posterior_gradient(d_z, d_x_t, *arguments)
    return d_moments, *(None,) * (len(arguments) - 1)


torch.library.register_autograd("fastdiff::posterior", _backward, setup_context=_context)


def declines(call: PosteriorCall) -> str:
    return COEFFICIENTS if differentiable(*call[1:7]) else ""


def run(call: PosteriorCall, backend: Backend) -> tuple[Tensor, Tensor | None, Any]:
    moments, xi, shift, scale, n, alpha, sigma, *how = call
    made = parts(xi, moments.device), parts(n, moments.device)
    z, x_t, kept = torch.ops.fastdiff.posterior(moments, *made[0], shift, scale, *made[1], alpha, sigma, *how)
    if n is None:
        return z, None, None
    return z, x_t, n if isinstance(n, Tensor) or not call.keep_noise else kept
