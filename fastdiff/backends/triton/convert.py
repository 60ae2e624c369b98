"""Conversion between kinds of prediction on a GPU, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import ConvertCall
from ..interface import COEFFICIENTS, Backend, differentiable
from ..saving import save, saved
from . import affine
from .affine import scaled
from .arguments import permuted, unsuited


def declines(call: ConvertCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    because = unsuited(call.m.device, call[:2], call[2:])
    return because or (COEFFICIENTS if differentiable(call.k_x, call.k_m) else "")


def run(call: ConvertCall, backend: Backend) -> Tensor:
    """See ``ConvertCall``; k_x and k_m may be ``Gathered``."""
    return (_Convert.apply if differentiable(call.m, call.x_t) else _launch)(*call)


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, m, x_t, k_x, k_m):
        save(ctx, k_m, k_x)
        ctx.dtypes = m.dtype, x_t.dtype
        return _launch(m, x_t, k_x, k_m)

    @staticmethod
    def backward(ctx, gradient):
        return (*scaled(gradient, zip(saved(ctx), ctx.dtypes, ctx.needs_input_grad[:2])), None, None)


def _launch(m, x_t, k_x, k_m):
    back, (model, state), (k_x, k_m) = permuted((m, x_t), (k_x, k_m))
    out = torch.empty_like(model)
    affine.run(tuple(model.shape), m.device, state, k_x, model, k_m, out)
    return out if back is None else out.permute(back)
