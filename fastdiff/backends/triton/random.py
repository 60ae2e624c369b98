"""Normals and uniforms on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from . import affine, arguments
from .arguments import DATA, Seeded, device_of, untouched
from .programs import coefficients
from .times import coefficients_launch


def makes(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether noise can be made here on ``device``, in ``dtype``."""
    return dtype in DATA and untouched() and arguments.runs_on(device)


def uniform(seed: int | Tensor, samples: int, stream: int, sample_offset: int, device: torch.device) -> Tensor:
    """See ``Backend.uniform``."""
    u = torch.empty(samples, dtype=torch.float64, device=device)
    if samples:
        coefficients(device, *coefficients_launch(None, u, None, seed, None, stream, sample_offset, samples))
    return u


def normal(
    seed: int | Tensor,
    shape: tuple[int, ...],
    stream: int,
    sample_offset: int,
    dtype: torch.dtype,
    device: torch.device,
    rng: str,
) -> Tensor:
    """See ``Backend.normal``."""
    z = torch.empty(shape, dtype=dtype, device=device)
    if z.numel():
        affine.run(tuple(shape), device, None, None, Seeded(seed, stream, sample_offset, 0.0, rng), None, None, z)
    return z


__all__ = ["device_of", "makes", "normal", "uniform"]
