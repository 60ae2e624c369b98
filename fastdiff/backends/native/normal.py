"""Normals on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import recycling
from ...calls import NormalCall
from ...codes import DATA
from ...torch_access import _C
from ..interface import Backend
from .launch import arrange, empty_on_cpu, makes, memory, samples


def declines(call: NormalCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    return makes(call.seed, call.sample_offset, call.device) or (
        "" if call.dtype in DATA else f"normals in {call.dtype}"
    )


def run(call: NormalCall, backend: Backend) -> Tensor:
    """See ``NormalCall``."""
    large = math.prod(call.shape) * call.dtype.itemsize >= recycling.LEAST
    z = (recycling.empty if large else empty_on_cpu)(call.shape, dtype=call.dtype)
    layout, _ = arrange(z.shape, packed=call.packed)
    source = int(call.seed), call.stream, samples(call.sample_offset), 0.0
    window = call.window and call.window.runs(z.shape[1:])
    _C.normal(layout, source, window, memory(z), torch.get_num_threads())
    return z
