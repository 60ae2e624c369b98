"""Uniforms."""

from __future__ import annotations

from torch import Tensor

from ...calls import UniformCall
from ..interface import Backend
from . import philox


def declines(call: UniformCall) -> str:
    return ""


def run(call: UniformCall, backend: Backend) -> Tensor:
    """See ``UniformCall``."""
    return philox.uniform(*call)
