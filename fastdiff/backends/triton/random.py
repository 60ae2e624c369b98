"""Normals and uniforms on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, launch
from .affine import affine
from .arguments import DATA, Seeded, seed_of, untouched

_UNIFORMS = 128  # a program


def makes(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether noise can be made here on ``device``, in ``dtype``."""
    return dtype in DATA and untouched() and arguments.runs_on(device)


def uniform(seed: int | Tensor, samples: int, stream: int, sample_offset: int, device: torch.device) -> Tensor:
    """See ``Backend.uniform``."""
    u = torch.empty(samples, dtype=torch.float64, device=device)
    if samples:
        launch.uniforms(device, *uniforms_launch(u, *seed_of(seed, device), stream, sample_offset, 0))
    return u


def uniforms_launch(
    out: Tensor, seed: int | Tensor, kind: str, stream: int, sample_offset: int, steps: int
) -> tuple[tuple[int, int], tuple, tuple]:
    """The launch of a uniform u in (0, 1) a sample; for ``steps`` > 0 of the timestep floor(steps u)."""
    samples = out.numel()
    arguments = (out, seed, stream, sample_offset, samples, steps)
    return (-(-samples // _UNIFORMS), 1), arguments, (kind, steps > 0, _UNIFORMS)


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
        affine(tuple(shape), device, None, None, Seeded(seed, stream, sample_offset, 0.0, rng), None, None, z)
    return z


def device_of(device: Any, seed: Any) -> torch.device:
    if device is None:
        return seed.device if isinstance(seed, Tensor) else torch.get_default_device()
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
