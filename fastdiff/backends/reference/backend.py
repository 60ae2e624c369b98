"""The reference as a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...calls import Call, ConvertCall, LossCall, NoiseCall, RunCall, StepCall
from ..interface import YES, Backend
from . import convert, loss, noise, philox, step
from .trajectory import Trajectory


class Reference(Backend):
    """Every operation in plain PyTorch, on any device; autograd differentiates it. The others must equal it.

    Args:
        maker: the backend that makes noise for it, which has the same bits; None: itself.
    """

    name, devices = "reference", ("cpu", "cuda", "mps", "xpu")

    def __init__(self, maker: Backend | None = None):
        self._maker = maker

    def description(self) -> str:
        return "plain PyTorch, on every device"

    def supports(self, call: Call) -> tuple[bool, str]:
        return YES

    def uniform(self, seed: int | Tensor, samples: int, stream: int, sample_offset: int = 0, device: Any = None):
        if self._maker is not None:
            return self._maker.uniform(seed, samples, stream, sample_offset, device)
        return philox.uniform(seed, samples, stream, sample_offset, device)

    def normal(
        self,
        seed: int | Tensor,
        shape: tuple[int, ...],
        stream: int = 0,
        sample_offset: int = 0,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        rng: str = "exact",
    ) -> Tensor:
        if self._maker is not None:
            return self._maker.normal(seed, shape, stream, sample_offset, dtype, device, rng)
        return philox.normal(seed, shape, stream, sample_offset, dtype, device)

    def noise(self, call: NoiseCall) -> tuple[Tensor, Any]:
        shape, device = call.x0.shape, call.x0.device
        n, xi = self.materialize(call.n, shape, device), self.materialize(call.xi, shape, device)
        x_t, kept = noise.noise(call, n, xi)
        return x_t, kept if call.keep_noise else call.n

    def loss(self, call: LossCall) -> Tensor:
        return loss.loss(call, self._noise_of(call))

    def loss_gradient(self, upstream: Tensor, call: LossCall) -> Tensor:
        return loss.loss_gradient(upstream, call, self._noise_of(call))

    def _noise_of(self, call: LossCall) -> Tensor | None:
        return None if call.q is None else self.materialize(call.n, call.prediction.shape, call.prediction.device)

    def convert(self, call: ConvertCall) -> Tensor:
        return convert.convert(call)

    def step(self, call: StepCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        shape, device = call.x.shape, call.x.device
        z, known = (self.materialize(n, shape, device) for n in (call.noise, call.known_noise))
        return step.step(call, z, known)

    def trajectory(self, call: RunCall) -> Trajectory:
        return Trajectory(self, call)
