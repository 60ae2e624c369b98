"""Latents of an autoencoder's moments on the CPU, and their gradient: one pass each. Noise is made again for the
gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...calls import PosteriorCall, made_from
from ...torch_access import _C
from .. import latents
from ..interface import COEFFICIENTS, Backend, differentiable
from .launch import arrange, contiguous, empty, memory, source, unsuited


def declines(call: PosteriorCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    because = unsuited(*call[:7], *made_from(call.xi), *made_from(call.n))
    return because or (COEFFICIENTS if differentiable(*call[1:7]) else "")


def run(call: PosteriorCall, backend: Backend) -> tuple[Tensor, Tensor | None, Any]:
    """See ``PosteriorCall``."""
    return latents.run(call, backend, _launch)


def _launch(call: PosteriorCall) -> tuple[Tensor, Tensor | None, Any]:
    shape, n = call.shape, call.n
    layout, (shift, scale, alpha, sigma) = arrange(shape, call.shift, call.scale, call.alpha, call.sigma)
    z = empty(shape, call.dtype, call.moments)
    x_t, kept = None if n is None else empty(shape, call.dtype, z), n
    if call.keep_noise and n is not None and not isinstance(n, Tensor):
        kept = empty(shape, scale.dtype, z)
    # What is pointed at must be held until the call returns.
    moments, xi, given = contiguous(call.moments), contiguous(call.xi), contiguous(n)
    _C.posterior(
        layout,
        memory(moments),
        source(xi),
        memory(shift),
        memory(scale),
        source(given),
        memory(alpha),
        memory(sigma),
        call.least,
        call.most,
        memory(z),
        memory(x_t),
        None if kept is n else memory(kept),
        torch.get_num_threads(),
    )
    return z, x_t, kept


def gradient(upstream: tuple[Tensor | None, Tensor | None], call: PosteriorCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    d_z, d_x_t = (contiguous(d) for d in upstream)
    layout, (scale, alpha) = arrange(call.shape, call.scale, None if d_x_t is None else call.alpha)
    moments, xi = contiguous(call.moments), contiguous(call.xi)
    made = empty(moments.shape, moments.dtype, moments)
    _C.posterior_gradient(
        layout,
        memory(moments),
        source(xi),
        memory(scale),
        memory(alpha),
        call.least,
        call.most,
        memory(d_z),
        memory(d_x_t),
        memory(made),
        torch.get_num_threads(),
    )
    return made
