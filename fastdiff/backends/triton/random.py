"""Normals and uniforms on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import affine, arguments
from .arguments import DATA, Seeded, device_of, untouched
from .programs import coefficients
from .times import coefficients_launch


def uniform(seed: int | Tensor, samples: int, stream: int, sample_offset: int, device: Any) -> Tensor | None:
    """See ``Backend.uniform``; None for a device that the kernels do not run on."""
    where = device_of(device, seed)
    if not _makes(where):
        return None
    u = torch.empty(samples, dtype=torch.float64, device=where)
    if samples:
        coefficients(where, *coefficients_launch(None, u, None, seed, None, stream, sample_offset, samples))
    return u


def normal(
    seed: int | Tensor,
    shape: tuple[int, ...],
    stream: int,
    sample_offset: int,
    dtype: torch.dtype,
    device: Any,
    rng: str,
) -> Tensor | None:
    """See ``Backend.normal``; None for a device that the kernels do not run on, or another dtype than theirs."""
    where = device_of(device, seed)
    if dtype not in DATA or not _makes(where):
        return None
    z = torch.empty(shape, dtype=dtype, device=where)
    if z.numel():
        affine.run(tuple(shape), where, None, None, Seeded(seed, stream, sample_offset, 0.0, rng), None, None, z)
    return z


def _makes(device: torch.device) -> bool:
    return untouched() and arguments.runs_on(device)
