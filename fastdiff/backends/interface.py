"""What a backend is: the operations, what it says of itself, and what it may be able to do besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..calls import Call, ConvertCall, LossCall, NoiseCall, RunCall, StepCall
from ..philox import Philox, Stream
from ..program import Program
from ..tensors import Gathered
from .devices import Trial

YES = (True, "")
# Reasons that several backends give.
TRANSFORMED = "a transform of torch.func, forward-mode derivatives or fake tensors"
COEFFICIENTS = "gradients of data, noise or coefficients"


def differentiable(*tensors: Any) -> bool:
    """Whether a gradient of one of these is wanted."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            tensor = tensor.column if isinstance(tensor, Gathered) else tensor
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return True
    return False


class Backend:
    """One implementation of the operations.

    A call is run only where ``supports`` says so; else ``otherwise`` is asked.

    Attributes:
        name, devices: what it is called, and the types of device that it is for.
        unavailable_because: why it cannot be used in this installation; empty where it can.
        direct: the module of fast calls, or None.
        otherwise: the backend that does what this one does not; None for the reference, which does everything.
        remakes_noise: whether noise is made again, in the pass over the data, faster than it would be read.
    """

    name: str
    devices: tuple[str, ...]
    unavailable_because = ""
    otherwise: Backend | None = None
    remakes_noise = False
    direct: Any = None

    # ---- what it says of itself

    def description(self) -> str:
        """What runs, for ``fastdiff doctor``."""
        return ""

    # Why it cannot run on a device of the types that it is for, found out by trying; None: it can run on all of them.
    trial: Trial | None = None

    def no_device_because(self) -> str:
        """Why there is nothing to run on; empty where there is."""
        return ""

    def supports(self, call: Call) -> tuple[bool, str]:
        """(whether it does this call, if not why)."""
        raise NotImplementedError

    # ---- the operations

    def uniform(self, seed: int | Tensor, samples: int, stream: int, sample_offset: int = 0, device: Any = None):
        """One uniform a sample in the open interval (0, 1): float64 [samples]."""
        raise NotImplementedError

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
        """Standard normals of ``shape``; ``rng`` as in ``fastdiff.ops.Philox``."""
        raise NotImplementedError

    def noise(self, call: NoiseCall) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def loss(self, call: LossCall) -> Tensor:
        raise NotImplementedError

    def loss_gradient(self, upstream: Tensor, call: LossCall) -> Tensor:
        """The gradient of the loss by the prediction, times ``upstream``, without autograd."""
        raise NotImplementedError

    def convert(self, call: ConvertCall) -> Tensor:
        raise NotImplementedError

    def step(self, call: StepCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        raise NotImplementedError

    def fast_step(self, x: Tensor, m: Tensor, row: Tensor, clip: float | None, n: Any, want_x0: bool) -> Any:
        """(y, x0 estimate or None) of a step on plain tensors, or None; n: a tensor, what ``Philox.whole`` gives, or
        None."""
        return None

    def trajectory(self, call: RunCall) -> Any:
        """What does the steps of a run: see ``fastdiff.backends.reference.Trajectory``."""
        raise NotImplementedError

    def noise_and_target(self, call: NoiseCall, p: Any, q: Any) -> tuple[Tensor, Any, Tensor]:
        """``noise`` and the target p x0 + q n in the dtype of x0, both placed; None leaves a term out. Two passes,
        unless a backend has a better way."""
        x_t, n = able(self, call).noise(call)
        zero = torch.zeros((1,) * call.x0.ndim, dtype=call.alpha.dtype, device=call.x0.device)
        target = NoiseCall(call.x0, n, zero if p is None else p, zero if q is None else q, keep_noise=False)
        return x_t, n, able(self, target).noise(target)[0]

    # ---- coefficients at times

    def evaluate(self, program: Program, t: Tensor, dtype: torch.dtype) -> Sequence[Any] | None:
        """What ``program`` computes at times that were checked, each of the shape of ``t``, rounded once to ``dtype``;
        a row that there is not is NaN. None: evaluate the formulas."""
        return program.gathered(t, dtype) if program.index else None

    def times(
        self, program: Program, seed: int | Tensor, samples: int, stream: int, sample_offset: int, device: Any,
        discrete: bool,
    ) -> Tensor | None:  # fmt: skip
        """One time a sample, which ``program`` makes of a uniform: int64 if ``discrete``, else float64. None: evaluate
        the formula."""
        return None

    # ---- made of these, unless a backend has a better way

    def materialize(self, noise: Any, shape: Any, device: torch.device) -> Tensor | None:
        """Noise as a tensor: float32 of ``shape``. A tensor, or None, is given back."""
        if not isinstance(noise, Philox):
            return noise
        shape, how = tuple(shape), {"device": device, "rng": noise.rng}
        n = self.normal(noise.seed, shape, noise.stream, noise.sample_offset, **how)
        if noise.offset:
            channels = self.normal(noise.seed, shape[:2], Stream.OFFSET, noise.sample_offset, **how)
            n = n + noise.offset * channels.reshape(*shape[:2], *(1,) * (len(shape) - 2))
        return n


def able(backend: Backend, call: Call) -> Backend:
    """``backend``, or the first after it that does this call."""
    while not backend.supports(call)[0]:
        backend = backend.otherwise
    return backend
