"""Uniforms on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import UniformCall
from ..interface import Backend
from .arguments import device_of, makes
from .programs import coefficients
from .times import coefficients_launch


def declines(call: UniformCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    return makes(call.seed, call.device)


def run(call: UniformCall, backend: Backend) -> Tensor:
    """See ``UniformCall``."""
    seed, samples, stream, sample_offset, device = call
    where = device_of(device, seed)
    u = torch.empty(samples, dtype=torch.float64, device=where)
    if samples:
        coefficients(where, *coefficients_launch(None, u, None, seed, None, stream, sample_offset, samples))
    return u
