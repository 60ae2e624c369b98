"""Which implementation an operation runs: while a program is traced the operators of ``torch_library``, else the
backend of the device."""

from __future__ import annotations

from types import ModuleType

import torch

from ..backends import registry
from . import torch_library


def get(device: torch.device) -> ModuleType:
    """The module with the operations for ``device``; while a program is traced, their operators."""
    return torch_library if torch.compiler.is_compiling() else registry.get(device)
