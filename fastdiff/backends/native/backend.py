"""The CPU's kernels as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...calls import Call, ConvertCall, LossCall, NoiseCall, RunCall, StepCall
from ...program import Program
from ...torch_access import _C, unavailable_because
from .. import reference
from ..interface import Backend
from . import coefficients, convert, fast, loss, noise, random, step
from .trajectory import Trajectory

_DECLINES = {
    NoiseCall: noise.declines,
    LossCall: loss.declines,
    ConvertCall: convert.declines,
    StepCall: step.declines,
}


class Native(Backend):
    """The operations on the CPU in C++ (csrc/), vectorised, one pass each."""

    name, devices = "native", ("cpu",)
    unavailable_because = unavailable_because
    fast = fast if fast.available else None

    def __init__(self):
        self.otherwise = reference.Reference(self)

    def description(self) -> str:
        return f"C++, {_C.simd()} of {', '.join(_C.simd_variants())}"

    def supports(self, call: Call) -> tuple[bool, str]:
        because = _DECLINES[type(call)](call)
        return not because, because

    def uniform(self, seed: int | Tensor, samples: int, stream: int, sample_offset: int = 0, device: Any = None):
        if not random.makes(seed, device):
            return reference.backend.uniform(seed, samples, stream, sample_offset, device)
        return random.uniform(seed, samples, stream, sample_offset)

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
        if not random.makes(seed, device, dtype):
            return reference.backend.normal(seed, shape, stream, sample_offset, dtype, device)
        return random.normal(seed, shape, stream, sample_offset, dtype)

    def noise(self, call: NoiseCall) -> tuple[Tensor, Any]:
        return noise.noise(call)

    def loss(self, call: LossCall) -> Tensor:
        return loss.loss(call, self.otherwise)

    def loss_gradient(self, upstream: Tensor, call: LossCall) -> Tensor:
        return loss.loss_gradient(upstream, call)

    def convert(self, call: ConvertCall) -> Tensor:
        return convert.convert(call)

    def step(self, call: StepCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return step.step(call)

    def evaluate(self, program: Program, t: Tensor, dtype: torch.dtype) -> Sequence[Any] | None:
        found = coefficients.evaluate(program, t, dtype)
        return super().evaluate(program, t, dtype) if found is None else found

    def times(
        self, program: Program, seed: int | Tensor, samples: int, stream: int, sample_offset: int, device: Any,
        discrete: bool,
    ) -> Tensor | None:  # fmt: skip
        return coefficients.times(program, seed, samples, stream, sample_offset, device, discrete)

    def fast_step(self, x: Tensor, m: Tensor, row: Tensor, clip: float | None, n: Any, want_x0: bool) -> Any:
        return None if self.fast is None else self.fast.step(x, m, row, clip, n, want_x0)

    def trajectory(self, call: RunCall) -> Trajectory:
        return Trajectory(self, call)
