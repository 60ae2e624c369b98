"""Normals."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import NormalCall
from ..interface import Backend
from . import philox


def declines(call: NormalCall) -> str:
    return ""


def run(call: NormalCall, backend: Backend) -> Tensor:
    """See ``NormalCall``."""
    seed, shape, stream, samples, dtype, device, _, window, packed = call
    if packed is None:
        return philox.normal(seed, shape, stream, samples, dtype, device, window)
    normals = torch.empty(shape, dtype=dtype, device=device)
    for k, sequence in enumerate(packed.split(normals)):
        of = samples[k : k + 1] if isinstance(samples, Tensor) else samples + k
        sequence.copy_(philox.normal(seed, (1, sequence.numel()), stream, of, dtype, device).view(sequence.shape))
    return normals
