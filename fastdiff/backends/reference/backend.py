"""The reference as a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...calls import Packed, RunCall
from ...philox import Window
from ..interface import Backend
from .trajectory import Trajectory


class Reference(Backend):
    """Every operation in plain PyTorch, on any device; autograd differentiates it. The others must equal it.

    Args:
        maker: the backend that makes noise for it, which has the same bits; None: itself.
    """

    name, package, devices = "reference", __package__, ("cpu", "cuda", "mps", "xpu")

    def __init__(self, maker: Backend | None = None):
        self._maker = maker
        self.modules  # noqa: B018  imported now: torch.compile traces what asks for them

    def description(self) -> str:
        return "plain PyTorch, on every device"

    def materialize(
        self, noise: Any, shape: Any, device: torch.device, window: Window | None = None, packed: Packed | None = None
    ) -> Tensor | None:
        maker = super() if self._maker is None else self._maker
        return maker.materialize(noise, shape, device, window, packed)

    def trajectory(self, call: RunCall) -> Trajectory:
        return Trajectory(self, call)
