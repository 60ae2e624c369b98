"""The contract of a backend: its operations, what it says of itself, and the abilities that it may have besides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..calls import Call, LossCall, NoiseCall, NormalCall, Packed, RunCall, UniformCall
from ..philox import Philox, Stream, Window
from ..program import Program
from ..tensors import Gathered
from .devices import Trial

YES = (True, "")
# Reasons that several backends give for declining a call.
TRANSFORMED = "a transform of torch.func, forward-mode derivatives or fake tensors"
COEFFICIENTS = "gradients of data, noise or coefficients"


def differentiable(*tensors: Any) -> bool:
    """Whether autograd wants a gradient of one of these tensors (a value that is no tensor is passed over)."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            tensor = tensor.column if isinstance(tensor, Gathered) else tensor
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return True
    return False


def weight_of_elements(call: LossCall) -> tuple[Any, ...]:
    """The weight of a loss by elements, whose gradient the kernels do not make: that of sums is made of the sums."""
    return (call.weight,) if call.reduction == "elements" else ()


class Backend:
    """One implementation of the operations: a package with a module for each. What it does not support, its fallback,
    ``otherwise``, is asked.

    Attributes:
        name: the name that ``use_backend`` takes.
        package: the name of the package of its operations.
        devices: the types of device that it is for.
        unavailable_because: why it cannot be used in this installation; empty if it can.
        fast: the module of its fast calls, or None if it has none.
        otherwise: its fallback; None for the reference, which does everything.
        remakes_noise: whether the loss makes noise again faster than it would read noise from memory.
    """

    name: str
    package: str
    devices: tuple[str, ...]
    unavailable_because = ""
    otherwise: Backend | None = None
    remakes_noise = False
    fast: Any = None

    # ---- what it says of itself

    def description(self) -> str:
        """One line for ``fastdiff doctor``: the versions and instruction sets that run."""
        return ""

    # Tries whether it runs on a device of its types. None: it runs on all of them.
    trial: Trial | None = None

    def no_device_because(self) -> str:
        """Why this machine has no device for it; empty if it has one."""
        return ""

    # ---- the operations

    @cached_property
    def modules(self) -> dict[type, ModuleType]:
        """The module that runs each record. It has the functions

        - ``declines(call)``: why it does not run this call; "" if it does;
        - ``run(call, backend)``: the result, as the record says. ``backend`` is the one that was asked;
        - for losses, moments and a posterior, ``gradient(upstream, call, backend, *needed)``: see ``gradient``;
        - for losses, ``value_and_gradient(upstream, call, backend)``: see there.

        A record that the package has no module for is left to the fallback.
        """
        names = {kind: f"{self.package}.{kind.operation}" for kind in Call.__args__}
        return {kind: import_module(name) for kind, name in names.items() if find_spec(name)}

    def supports(self, call: Call) -> tuple[bool, str]:
        """(True, "") if it runs this call; (False, the reason) if not."""
        module = self.modules.get(type(call))
        because = module.declines(call) if module else f"it has no operation {call.operation!r}"
        return not because, because

    def run(self, call: Call) -> Any:
        """The result of a call that it supports: see the record."""
        return self.modules[type(call)].run(call, self)

    def gradient(self, upstream: Any, call: Call, *needed: bool) -> Any:
        """The gradient of a call that it supports, times ``upstream``, shaped and typed as what it is the gradient by.
        It is not recorded by autograd.

        Args:
            upstream: the gradient of the result: of a loss [], or the shape of the result for reduction "none"; of
                moments a sequence in their order, and of a posterior those of z and x_t, with None for those that are
                absent.
            needed: of moments, whether the gradient by a, and that by b, is needed.

        Returns, of a loss, the gradient by the output; of a ``posterior`` and a ``kl_normal`` that by the moments that
        they are given; of row moments, those by a and by b, None where not needed.
        """
        return self.modules[type(call)].gradient(upstream, call, self, *needed)

    def value_and_gradient(self, upstream: Tensor | float, call: LossCall) -> tuple[Tensor, Tensor]:
        """(the result of a loss that it supports, its ``gradient``), neither recorded by autograd, which wants no
        gradient of the tensors of ``call``. In one pass where no sums have to be known first. ``upstream`` may be a
        number too."""
        return self.modules[type(call)].value_and_gradient(upstream, call, self)

    # ---- abilities

    def fast_step(self, x: Tensor, m: Tensor, row: Tensor, clip: float | None, n: Any, want_x0: bool) -> Any:
        """A step as a fast call: (y, x0 estimate or None); or None if it does not take these tensors.

        Args:
            x, m: sample and model output, [batch, ...].
            row: [columns], for the whole batch.
            n: noise shaped as x, or the tuple that ``Philox.whole`` makes of a ``Philox``, or None for no noise.
        """
        return None

    def trajectory(self, call: RunCall) -> Any:
        """An object that takes the steps of a run: see ``fastdiff.backends.reference.Trajectory``."""
        raise NotImplementedError

    def noise_and_target(self, call: NoiseCall, p: Any, q: Any) -> tuple[Tensor, Any, Tensor]:
        """(x_t, n, target): ``noise``, and the target p x0 + q n in the dtype of x_t, shaped as x0. Two passes, unless
        a backend does both in one.

        Args:
            p, q: placed coefficients; None leaves the term out.
        """
        x_t, n = run(self, call)
        zero = torch.zeros((1,) * call.x0.ndim, dtype=call.alpha.dtype, device=call.x0.device)
        p, q = zero if p is None else p, zero if q is None else q
        target = NoiseCall(call.x0, n, p, q, keep_noise=False, dtype=call.dtype, order=call.order, packed=call.packed)
        return x_t, n, run(self, target)[0]

    # ---- coefficients at times

    def evaluate(self, program: Program, t: Tensor, dtype: torch.dtype) -> Sequence[Any] | None:
        """Run ``program`` at times that were checked. Returns one tensor for each of its names, shaped as ``t``,
        rounded once to ``dtype``, NaN where a table has no such row; or None if the formulas have to be evaluated
        instead."""
        return program.gathered(t, dtype) if program.index else None

    def times(self, program: Program, call: UniformCall, discrete: bool) -> Tensor | None:
        """The times that ``program`` computes from the uniforms of ``call``, in their shape: int64 if ``discrete``,
        else float64. None if the formula has to be evaluated instead."""
        return None

    # ---- made of these, unless a backend has a better way

    def materialize(
        self, noise: Any, shape: Any, device: torch.device, window: Window | None = None, packed: Packed | None = None
    ) -> Tensor | None:
        """Make noise into a tensor, float32 of ``shape``, which with a ``window`` is a slice of each sample. A tensor,
        or None, is returned as it is."""
        if not isinstance(noise, Philox):
            return noise
        shape, how = tuple(shape), {"device": device, "rng": noise.rng}
        made = noise.seed, shape, noise.stream, noise.sample_offset
        n = run(self, NormalCall(*made, window=window, packed=packed, **how))
        if noise.offset:
            along = window and Window(window.shape[:1], window.start[:1])
            of_channels = NormalCall(
                noise.seed, shape[:2], Stream.OFFSET, noise.sample_offset, window=along, **how
            )  # fmt: skip
            channels = run(self, of_channels)
            n = n + noise.offset * channels.reshape(*shape[:2], *(1,) * (len(shape) - 2))
        return n


def able(backend: Backend, call: Call) -> Backend:
    """``backend`` if it supports this call, otherwise the first of its fallbacks that does."""
    while not backend.supports(call)[0]:
        backend = backend.otherwise
    return backend


def run(backend: Backend, call: Call) -> Any:
    """The result of ``call`` by ``backend``, or by the first of its fallbacks that supports it."""
    while not backend.supports(call)[0]:  # as ``able``
        backend = backend.otherwise
    return backend.run(call)
