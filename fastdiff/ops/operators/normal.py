"""Normals as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.interface import Backend
from ...calls import NormalCall
from ...philox import Window, seed_tensor
from .declaring import PACKED, declare, offset_and_ids, packed_of
from .declaring import run as runs


def _fake(seed, shape, stream, sample_offset, ids, dtype, rng, whole, start, starts, dim):
    return seed.new_empty(shape, dtype=dtype)


@declare(
    "normal",
    "(Tensor seed, SymInt[] shape, int stream, SymInt sample_offset, Tensor? ids, ScalarType dtype, str rng, "
    f"SymInt[]? whole, SymInt[]? start, {PACKED}) -> Tensor",
    _fake,
)
def _normal(seed, shape, stream, sample_offset, ids, dtype, rng, whole, start, starts, dim):
    window = None if whole is None else Window(tuple(whole), tuple(start))
    samples, packed = sample_offset if ids is None else ids, packed_of(starts, dim)
    call = NormalCall(seed, tuple(shape), stream, samples, dtype, seed.device, rng, window, packed)
    return runs(call, seed).contiguous()


def declines(call: NormalCall) -> str:
    return ""


def run(call: NormalCall, backend: Backend) -> Tensor:
    seed, shape, stream, sample_offset, dtype, device, rng, window, packed = call
    none = None, None
    how = *offset_and_ids(sample_offset), dtype, rng, *(window or none), *(packed or none)
    return torch.ops.fastdiff.normal(seed_tensor(seed, device), shape, stream, *how)
