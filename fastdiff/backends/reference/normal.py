"""Normals."""

from __future__ import annotations

from torch import Tensor

from ...calls import NormalCall
from ..interface import Backend
from . import philox


def declines(call: NormalCall) -> str:
    return ""


def run(call: NormalCall, backend: Backend) -> Tensor:
    """See ``NormalCall``."""
    return philox.normal(*call[:6], window=call.window)
