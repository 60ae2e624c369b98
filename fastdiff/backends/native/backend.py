"""The CPU's kernels as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...calls import RunCall, UniformCall
from ...program import Program
from ...torch_access import _C, unavailable_because
from .. import reference
from ..interface import Backend
from . import coefficients, fast
from .trajectory import Trajectory


class Native(Backend):
    """The operations on the CPU in C++ (csrc/), vectorised, one pass each."""

    name, package, devices = "native", __package__, ("cpu",)
    unavailable_because = unavailable_because
    fast = fast if fast.available else None

    def __init__(self):
        self.otherwise = reference.Reference(self)

    def description(self) -> str:
        return f"C++, {_C.simd()} of {', '.join(_C.simd_variants())}"

    def evaluate(self, program: Program, t: Tensor, dtype: torch.dtype) -> Sequence[Any] | None:
        found = coefficients.evaluate(program, t, dtype)
        return super().evaluate(program, t, dtype) if found is None else found

    def times(self, program: Program, call: UniformCall, discrete: bool) -> Tensor | None:
        return coefficients.times(program, call, discrete)

    def fast_step(self, x: Tensor, m: Tensor, row: Tensor, clip: float | None, n: Any, want_x0: bool) -> Any:
        return None if self.fast is None else self.fast.step(x, m, row, clip, n, want_x0)

    def trajectory(self, call: RunCall) -> Trajectory:
        return Trajectory(self, call)
