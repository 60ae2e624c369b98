"""Coefficients as the reference takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...calls import Packed
from ...tensors import as_tensor


def rows(*coefficients: Any, packed: Packed | None = None, shape: tuple[int, ...] = ()) -> list[Any]:
    """The coefficients as tensors that broadcast to data of ``shape``. Those made under ``torch.inference_mode`` are
    copied where autograd is on: it cannot save them afterwards."""
    found = [as_tensor(c) if packed is None else packed.spread(c, shape) for c in coefficients]
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        return found
    return [c.clone() if isinstance(c, Tensor) and c.is_inference() else c for c in found]
