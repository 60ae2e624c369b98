"""The choice of what runs an operation. While a program is traced, it is the operators of ``torch_library``; otherwise
the backend of the device. If that does not support the call, its fallback is asked.
"""

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
