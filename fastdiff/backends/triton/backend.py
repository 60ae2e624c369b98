"""The GPU's kernels as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...calls import NoiseCall, RunCall, UniformCall
from ...program import Program
from .. import reference
from ..interface import Backend
from . import availability
from .interpreter import interpreted


class Triton(Backend):
    """The operations on a GPU in Triton, one pass each."""

    name, package, devices = "triton", __package__, ("cuda", "xpu")
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

    # Triton is an optional package, imported when something of these, or of ``modules``, is first asked.

    @cached_property
    def _times(self) -> ModuleType:
        from . import times

        return times

    @cached_property
    def _trajectory(self) -> ModuleType:
        from . import trajectory

        return trajectory

    @cached_property
    def fast(self) -> ModuleType:
        from . import fast

        return fast

    def noise_and_target(self, call: NoiseCall, p: Any, q: Any) -> tuple[Tensor, Any, Tensor]:
        return self.modules[NoiseCall].noise_and_target(call, p, q) or super().noise_and_target(call, p, q)

    def trajectory(self, call: RunCall) -> reference.Trajectory:
        return self._trajectory.Trajectory(self, call)

    def evaluate(self, program: Program, t: Tensor, dtype: torch.dtype) -> Sequence[Any] | None:
        found = self._times.evaluate(program, t, dtype)
        return super().evaluate(program, t, dtype) if found is None else found

    def times(self, program: Program, call: UniformCall, discrete: bool) -> Tensor | None:
        return self._times.times(program, call, discrete)
