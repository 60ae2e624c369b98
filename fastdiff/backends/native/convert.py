"""Conversion between kinds of prediction on the CPU, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import ConvertCall
from ...torch_access import _C
from ..interface import COEFFICIENTS, Backend, differentiable
from ..saving import save, saved
from .launch import arrange, contiguous, empty, in_format_of, memory, unsuited


def declines(call: ConvertCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    return unsuited(*call) or (COEFFICIENTS if differentiable(call.k_x, call.k_m) else "")


def run(call: ConvertCall, backend: Backend) -> Tensor:
    """See ``ConvertCall``."""
    return _Convert.apply(*call) if differentiable(call.m, call.x_t) else _launch(*call)


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, m, x_t, k_x, k_m):
        save(ctx, k_x, k_m)
        ctx.dtypes = m.dtype, x_t.dtype
        return _launch(m, x_t, k_x, k_m)

    @staticmethod
    def backward(ctx, gradient):
        k_x, k_m = saved(ctx)
        wide = gradient.to(k_m.dtype)
        d_m = (k_m * wide).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        d_x = (k_x * wide).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return d_m, d_x, None, None


def _launch(m: Tensor, x_t: Tensor, k_x: Tensor, k_m: Tensor) -> Tensor:
    layout, (k_x, k_m) = arrange(m.shape, k_x, k_m)
    out = empty(m.shape, m.dtype, m)
    data, x = contiguous(m), contiguous(x_t)
    _C.convert(layout, memory(data), memory(x), memory(k_x), memory(k_m), memory(out), torch.get_num_threads())
    return in_format_of(m, out)
