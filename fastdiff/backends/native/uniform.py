"""Uniforms on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import UniformCall
from ...torch_access import _C
from ..interface import Backend
from .launch import makes, memory, samples


def declines(call: UniformCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    return makes(call.seed, call.sample_offset, call.device)


def run(call: UniformCall, backend: Backend) -> Tensor:
    """See ``UniformCall``."""
    u = torch.empty(call.shape, dtype=torch.float64, device="cpu")
    _C.uniform(int(call.seed), call.stream, samples(call.sample_offset), memory(u), call.samples)
    return u
