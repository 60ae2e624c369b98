"""Normals on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import NormalCall
from ..interface import Backend
from . import affine
from .arguments import DATA, Seeded, device_of, makes, too_many


def declines(call: NormalCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    because = makes(call.seed, call.device) or ("" if call.packed is None else too_many(call.packed))
    return because or ("" if call.dtype in DATA else f"normals in {call.dtype}")


def run(call: NormalCall, backend: Backend) -> Tensor:
    """See ``NormalCall``."""
    where = device_of(call.device, call.seed)
    z = torch.empty(call.shape, dtype=call.dtype, device=where)
    if z.numel():
        n = Seeded(call.seed, call.stream, call.sample_offset, 0.0, call.rng)
        affine.run(tuple(call.shape), where, None, None, n, None, None, z, packed=call.packed)
    return z
