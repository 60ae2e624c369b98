"""Uniforms as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.interface import Backend
from ...calls import UniformCall
from ...philox import seed_tensor
from .declaring import declare, offset_and_ids
from .declaring import run as runs


def _call(seed, samples, stream, sample_offset, ids, count):
    return UniformCall(seed, samples, stream, sample_offset if ids is None else ids, seed.device, count)


def _fake(seed, *arguments):
    return seed.new_empty(_call(seed, *arguments).shape, dtype=torch.float64)


_SCHEMA = "(Tensor seed, SymInt samples, int stream, SymInt sample_offset, Tensor? ids, SymInt? count) -> Tensor"


@declare("uniform", _SCHEMA, _fake)
def _uniform(seed, *arguments):
    return runs(_call(seed, *arguments), seed)


def declines(call: UniformCall) -> str:
    return ""


def run(call: UniformCall, backend: Backend) -> Tensor:
    seed, samples, stream, sample_offset, device, count = call
    seed = seed_tensor(seed, device)
    return torch.ops.fastdiff.uniform(seed, samples, stream, *offset_and_ids(sample_offset), count)
