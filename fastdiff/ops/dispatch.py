"""Which implementation an operation runs: while a program is traced the operators of ``torch_library``, else the
backend of the device; for what that does not do, the next one."""

from __future__ import annotations

import torch

from ..backends import registry
from ..backends.interface import Backend, able
from ..calls import Call
from .torch_library import operators


def get(device: torch.device) -> Backend:
    """What is asked first for data on ``device``."""
    return operators if torch.compiler.is_compiling() else registry.get(device)


def runs(call: Call, device: torch.device) -> Backend:
    """What runs ``call``, whose data is on ``device``."""
    return able(get(device), call)
