"""The CUDA kernel of the sampler step as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...calls import RunCall
from .. import reference, triton
from ..interface import Backend
from . import step
from .trajectory import Trajectory


class Cuda(Backend):
    """The sampler step on a CUDA device. What else it is asked, the next backend is."""

    name, package, devices = "cuda", __package__, ("cuda",)
    unavailable_because = step.unavailable_because
    trial = step.unfit_because

    @property
    def otherwise(self) -> Backend:
        return reference.backend if triton.backend.unavailable_because else triton.backend

    @property
    def remakes_noise(self) -> bool:
        return self.otherwise.remakes_noise

    @property
    def fast(self) -> Any:
        return self.otherwise.fast

    def description(self) -> str:
        names = ", ".join(f"{number // 10}.{number % 10}" for number in step._C.cuda_architectures())
        return f"CUDA, the sampler step, for compute capability {names} and what runs their code"

    def no_device_because(self) -> str:
        return "" if torch.cuda.is_available() else step.NO_DEVICE

    def noise_and_target(self, *arguments: Any) -> tuple[Tensor, Any, Tensor]:
        return self.otherwise.noise_and_target(*arguments)

    def trajectory(self, call: RunCall) -> Trajectory:
        return Trajectory(self, call)

    def evaluate(self, *arguments: Any) -> Sequence[Any] | None:
        return self.otherwise.evaluate(*arguments)

    def times(self, *arguments: Any) -> Tensor | None:
        return self.otherwise.times(*arguments)
