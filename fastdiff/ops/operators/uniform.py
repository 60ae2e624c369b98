"""Uniforms as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.interface import Backend
from ...calls import UniformCall
from ...philox import seed_tensor
from .declaring import declare, offset_and_ids
from .declaring import run as runs


def _fake(seed, samples, stream, sample_offset, ids):
    return seed.new_empty((samples,), dtype=torch.float64)


@declare("uniform", "(Tensor seed, SymInt samples, int stream, SymInt sample_offset, Tensor? ids) -> Tensor", _fake)
def _uniform(seed, samples, stream, sample_offset, ids):
    return runs(UniformCall(seed, samples, stream, sample_offset if ids is None else ids, seed.device), seed)


def declines(call: UniformCall) -> str:
    return ""


def run(call: UniformCall, backend: Backend) -> Tensor:
    seed, samples, stream, sample_offset, device = call
    return torch.ops.fastdiff.uniform(seed_tensor(seed, device), samples, stream, *offset_and_ids(sample_offset))
