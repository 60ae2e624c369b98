"""The choice of what runs an operation. While a program is traced, it is the operators of ``operators/``; otherwise
the backend of the device. If that does not support the call, its fallback is asked.
"""

from __future__ import annotations

from typing import Any

import torch

from ..backends import interface, registry
from ..backends.interface import Backend
from ..calls import Call
from .operators import operators


def get(device: torch.device) -> Backend:
    """The operators while a program is traced, otherwise the backend for ``device``."""
    return operators if torch.compiler.is_compiling() else registry.get(device)


def run(call: Call, device: torch.device) -> Any:
    """The result of ``call``, whose data is on ``device``."""
    return interface.run(get(device), call)
