"""Autograd of an autoencoder's latents, for the backends that compute the gradient themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import modes
from ..calls import PosteriorCall
from .interface import Backend, differentiable
from .saving import save, saved


def run(call: PosteriorCall, backend: Backend, launch: Any) -> tuple[Tensor, Tensor | None, Any]:
    """The result of ``launch(call)``, recorded by autograd where it is wanted; its gradient is ``backend.gradient``."""
    if not differentiable(call.moments):
        return launch(call)
    z, x_t, made = _Latents.apply(call.moments, call, backend, launch)
    return z, x_t, call.n if made is None else made


class _Latents(torch.autograd.Function):
    @staticmethod
    def forward(ctx, moments, call, backend, launch):
        ctx.set_materialize_grads(False)  # a result without a gradient is left out of the sum
        # What the gradient is made of; the noise of x_t and its factor are not.
        save(ctx, moments, call.xi, call.scale, call.alpha)
        ctx.call, ctx.backend = call._replace(moments=None, xi=None, shift=None, n=None, sigma=None), backend
        z, x_t, n = launch(call)
        if n is call.n:
            return z, x_t, None
        ctx.mark_non_differentiable(n)
        return z, x_t, n

    @staticmethod
    def backward(ctx, d_z, d_x_t, _):
        if d_z is None and d_x_t is None:
            return None, None, None, None
        moments, xi, scale, alpha = saved(ctx)
        call, backend = ctx.call._replace(moments=moments, xi=xi, scale=scale, alpha=alpha), ctx.backend
        many = any(d is not None and modes.is_many(d) for d in (d_z, d_x_t))
        # The reference's formula is differentiable itself.
        backend = backend.otherwise if torch.is_grad_enabled() or many else backend
        return backend.gradient((d_z, d_x_t), call), None, None, None
