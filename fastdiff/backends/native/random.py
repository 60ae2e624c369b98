"""Normals and uniforms on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codes import DATA
from ...torch_access import _C
from .launch import arrange, memory, unsuited


def makes(seed: int | Tensor, device: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether noise of this seed can be made here, in ``dtype``, for ``device``."""
    return dtype in DATA and not unsuited(seed) and (device is None or torch.device(device).type == "cpu")


def uniform(seed: int | Tensor, samples: int, stream: int, sample_offset: int) -> Tensor:
    """See ``Backend.uniform``."""
    u = torch.empty(samples, dtype=torch.float64, device="cpu")
    _C.uniform(int(seed), stream, sample_offset, memory(u), samples)
    return u


def normal(seed: int | Tensor, shape: tuple[int, ...], stream: int, sample_offset: int, dtype: torch.dtype) -> Tensor:
    """See ``Backend.normal``."""
    z = torch.empty(shape, dtype=dtype, device="cpu")
    layout, _ = arrange(z.shape)
    _C.normal(layout, (int(seed), stream, sample_offset, 0.0), memory(z), torch.get_num_threads())
    return z
