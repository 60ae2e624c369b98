"""Conversion between kinds of prediction as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.interface import COEFFICIENTS, Backend, differentiable
from ...calls import ConvertCall
from .declaring import affine_gradient, declare, strided
from .declaring import run as runs


def _fake(m, x_t, k_x, k_m):
    return torch.empty_like(m)


@declare("convert", "(Tensor m, Tensor x_t, Tensor k_x, Tensor k_m) -> Tensor", _fake)
def _convert(m, x_t, k_x, k_m):
    return strided(runs(ConvertCall(m, x_t, k_x, k_m), m), m)


def _context(ctx, inputs, output):
    m, x_t, k_x, k_m = inputs
    ctx.save_for_backward(k_x, k_m)
    ctx.dtypes = m.dtype, x_t.dtype


def _backward(ctx, upstream):
    k_x, k_m = ctx.saved_tensors
    d_m = affine_gradient(upstream, k_m, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    d_x = affine_gradient(upstream, k_x, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return d_m, d_x, None, None


torch.library.register_autograd("fastdiff::convert", _backward, setup_context=_context)


def declines(call: ConvertCall) -> str:
    return COEFFICIENTS if differentiable(call.k_x, call.k_m) else ""


def run(call: ConvertCall, backend: Backend) -> Tensor:
    return torch.ops.fastdiff.convert(*call)
