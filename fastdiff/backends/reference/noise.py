"""Noising."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...calls import NoiseCall
from ...tensors import decoded
from ..interface import Backend
from ..layout import empty_in_order
from .coefficients import rows


def declines(call: NoiseCall) -> str:
    return ""


def run(call: NoiseCall, backend: Backend) -> tuple[Tensor, Any]:
    """See ``NoiseCall``."""
    shape, device = call.x0.shape, call.x0.device
    n, xi = (backend.materialize(noise, shape, device, packed=call.packed) for noise in (call.n, call.xi))
    alpha, sigma = rows(call.alpha, call.sigma, packed=call.packed, shape=shape)
    dtype = alpha.dtype
    seen = n.to(dtype)
    if xi is not None:
        seen = seen + call.perturbation * xi.to(dtype)
    x_t = (alpha * decoded(call.x0).to(dtype) + sigma * seen).to(call.stored)
    if call.order is not None:
        x_t = empty_in_order(tuple(shape), call.order, x_t.dtype, device).copy_(x_t)
    return x_t, n.to(dtype) if n is not call.n and call.keep_noise else call.n
