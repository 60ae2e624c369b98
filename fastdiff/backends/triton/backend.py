"""The GPU's kernels as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...calls import Call, ConvertCall, LossCall, NoiseCall, RunCall, StepCall
from ...program import Program
from .. import reference
from ..interface import Backend
from . import availability
from .interpreter import interpreted


class Triton(Backend):
    """The operations on a GPU in Triton, one pass each."""

    name, devices = "triton", ("cuda", "xpu")
    unavailable_because = availability.unavailable_because
    remakes_noise = True  # in the loss's launch
    trial = availability.unfit_because

    def __init__(self):
        self.otherwise = reference.Reference(self)

    def description(self) -> str:
        import triton

        return f"Triton {triton.__version__}" + (", interpreted" if interpreted() else "")

    def no_device_because(self) -> str:
        return availability.no_device_because()

    # Triton is an optional package, imported when something of these is first asked.

    @cached_property
    def _modules(self) -> dict[type, ModuleType]:
        from . import convert, loss, noise, step

        return {NoiseCall: noise, LossCall: loss, ConvertCall: convert, StepCall: step}

    @cached_property
    def _random(self) -> ModuleType:
        from . import random

        return random

    @cached_property
    def _times(self) -> ModuleType:
        from . import times

        return times

    @cached_property
    def fast(self) -> ModuleType:
        from . import fast

        return fast

    def supports(self, call: Call) -> tuple[bool, str]:
        because = self._modules[type(call)].declines(call)
        return not because, because

    def uniform(self, seed: int | Tensor, samples: int, stream: int, sample_offset: int = 0, device: Any = None):
        arguments = seed, samples, stream, sample_offset, device
        found = self._random.uniform(*arguments)
        return reference.backend.uniform(*arguments) if found is None else found

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
        arguments = seed, shape, stream, sample_offset, dtype, device
        found = self._random.normal(*arguments, rng)
        return reference.backend.normal(*arguments) if found is None else found

    def noise(self, call: NoiseCall) -> tuple[Tensor, Any]:
        return self._modules[NoiseCall].run(call)

    def noise_and_target(self, call: NoiseCall, p: Any, q: Any) -> tuple[Tensor, Any, Tensor]:
        return self._modules[NoiseCall].noise_and_target(call, p, q) or super().noise_and_target(call, p, q)

    def loss(self, call: LossCall) -> Tensor:
        return self._modules[LossCall].run(call, self.otherwise)

    def loss_gradient(self, upstream: Tensor, call: LossCall) -> Tensor:
        return self._modules[LossCall].loss_gradient(upstream, call)

    def convert(self, call: ConvertCall) -> Tensor:
        return self._modules[ConvertCall].run(call)

    def step(self, call: StepCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._modules[StepCall].run(call)

    def trajectory(self, call: RunCall) -> reference.Trajectory:
        return reference.Trajectory(self, call)

    def evaluate(self, program: Program, t: Tensor, dtype: torch.dtype) -> Sequence[Any] | None:
        found = self._times.evaluate(program, t, dtype)
        return super().evaluate(program, t, dtype) if found is None else found

    def times(
        self, program: Program, seed: int | Tensor, samples: int, stream: int, sample_offset: int, device: Any,
        discrete: bool,
    ) -> Tensor | None:  # fmt: skip
        return self._times.times(program, seed, samples, stream, sample_offset, device, discrete)
