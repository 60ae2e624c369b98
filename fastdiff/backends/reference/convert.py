"""Conversion between kinds of prediction."""

from __future__ import annotations

from torch import Tensor

from ...calls import ConvertCall
from ..interface import Backend
from .coefficients import rows


def declines(call: ConvertCall) -> str:
    return ""


def run(call: ConvertCall, backend: Backend) -> Tensor:
    """See ``ConvertCall``."""
    k_x, k_m = rows(call.k_x, call.k_m)
    return (k_x * call.x_t.to(k_x.dtype) + k_m * call.m.to(k_x.dtype)).to(call.m.dtype)
