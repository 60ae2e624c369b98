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
    where = device_of(call.device, call.seed)
    u = torch.empty(call.shape, dtype=torch.float64, device=where)
    if u.numel():
        how = None, u, None, call.seed, None, call.stream, call.sample_offset, u.numel()
        coefficients(where, *coefficients_launch(*how, each=call.count or 1))
    return u
