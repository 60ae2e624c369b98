"""A run of steps on the CPU: ``fastdiff._C`` holds what stays the same (csrc/trajectory.cpp), so a step is one call
with four arguments.

x is written over where it is, and a history entry over the oldest one, unless somebody looks (a callback, or a network
that keeps its input: references are counted). A step then goes through x and the network's output alone, two thirds of
the memory of a step with a third tensor, and 16x3x256x256 stays in the cache. All of a step is in registers until it is
stored. Only an output that shares memory with x in another arrangement is copied first.
"""

from __future__ import annotations

import math
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from ... import recycling
from ...calls import RunCall, made_from
from ...codes import DATA, DTYPES
from ...torch_access import _C
from .. import reference
from ..interface import Backend
from ..layout import layout_of
from .launch import arrange, empty_on_cpu, masked, memory, samples, source, unsuited

_ONE = {dtype: torch.ones(1, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


class Trajectory(reference.Trajectory):
    """As ``reference.Trajectory``, with one call of ``fastdiff._C`` a step. With ``reuse`` a step writes over x, unless
    somebody else holds that tensor."""

    def __init__(self, backend: Backend, call: RunCall):
        super().__init__(backend, call)
        x, _, guidance, clip, mask, known, known_noise, philox, self._reuse = call
        given = (x, self._placed, guidance, mask, known, known_noise, *made_from(known_noise), *made_from(philox))
        self._prepared = not unsuited(*given) and x.ndim > 0 and x.is_contiguous() and x.numel() > 0
        if not self._prepared:
            return
        placed, shape = self._placed, x.shape
        self._shape, self._both, self._elements = shape, (2 * shape[0], *shape[1:]), x.numel()
        self._empty = recycling.empty if x.nbytes >= recycling.LEAST else empty_on_cpu
        self._code, self._size = DTYPES[x.dtype], x.element_size()
        ones = (1,) * len(shape)
        if isinstance(guidance, Tensor):
            layout, (rows,) = arrange(shape, guidance)
            spread = placed.new_empty(1).expand(shape[0], *ones[1:])
            by_sample, (_, sample_rows) = arrange(shape, spread, guidance)
        else:
            layout, by_sample = layout_of(shape, ones)[0], layout_of(shape, (shape[0], *ones[1:]))[0]
            rows = sample_rows = _ONE[placed.dtype] if guidance == 1 else placed.new_full((1,), guidance)
        known = None if known is None else known.contiguous()
        known_noise = known_noise.contiguous() if isinstance(known_noise, Tensor) else known_noise
        made = None if philox is None else (int(philox.seed), 0, samples(philox.sample_offset), philox.offset)
        count = max(self.reads, default=0)
        history = self._empty((count, *shape), dtype=placed.dtype) if count else None
        self._held = (
            x,
            placed,
            rows,
            sample_rows,
            mask,
            known,
            known_noise,
            philox,
            history,
        )  # what is pointed at must live
        self._launch, self._aim = _C.trajectory(
            memory(x),
            tuple(shape),
            layout,
            memory(rows),
            by_sample,
            memory(sample_rows),
            memory(placed),
            clip,
            masked(mask, shape),
            memory(known),
            source(known_noise),
            made,
            memory(history),
            torch.get_num_threads(),
        )
        self._target: int | None = None
        self._holders: float = math.inf  # of seen, after the last step
        self._buffers: dict[Any, Tensor] = {}

    def step(
        self,
        k: int,
        m: Tensor,
        guided: bool = False,
        noise: Any = None,
        copies: int = 1,
        want_x0: bool = False,
        log_variance: Tensor | None = None,
        threshold: Tensor | None = None,
        row: Tensor | None = None,
        history: tuple[Tensor, ...] | None = None,
    ) -> None:
        """As ``reference.Trajectory.step``."""
        if not self._prepared:
            super().step(k, m, guided, noise, copies, want_x0, log_variance, threshold, row, history)
            return
        if getrefcount(self.seen) > self._holders:  # the network, or the caller, keeps it
            self._buffers.clear()
            self._target = None
        target = (copies > 1) + (2 if copies and self.scales[k] != 1 else 0)
        if target != self._target:
            self._turn_to(target)
        plain = not want_x0 and log_variance is threshold is row is history is None
        if isinstance(noise, Tensor):
            self._check_noise(noise)
            given = _data(noise)
            noise = memory(given)
        if not plain or not self._launch(k, m, guided, noise):
            self._step_with(k, m, guided, noise, want_x0, log_variance, threshold, row, history)
        self.x, self.seen = self._y, self._next
        if self._reuse:
            self._holders = getrefcount(self.seen)
        else:
            self._target = None

    def _step_with(self, k, m, guided, noise, want_x0, log_variance, threshold, row, history) -> None:
        """A step with more than the common arguments, or with an output that is not contiguous."""
        if not isinstance(m, Tensor):
            raise TypeError(f"the model must return a tensor; got {type(m).__name__}.")
        if m.shape != (self._both if guided else self._shape):
            self._refuse_shape(m, guided)
        held = [None if tensor is None else _data(tensor) for tensor in (m, log_variance)]
        held += [None if tensor is None else tensor.contiguous() for tensor in (threshold, row)]
        past = None if history is None else [_data(entry) for entry in history]
        x0 = self._empty(self._shape, dtype=self.x.dtype) if want_x0 else None
        rest = (*map(memory, held[1:]), None if past is None else tuple(map(memory, past)), memory(x0))
        if not self._launch(k, memory(held[0]), guided, noise, *rest):
            apart = held[0].clone()  # it shared memory with x, in another arrangement
            self._launch(k, memory(apart), guided, noise, *rest)
        if x0 is not None:
            self.x0 = x0

    def _turn_to(self, target: int) -> None:
        """Choose the output buffers of the next steps: y, and c_in y for the network's next input, which holds it twice
        if ``target`` & 1 and is scaled if ``target`` & 2."""
        twice, scaled = bool(target & 1), bool(target & 2)
        both = self._buffer("both", self._both) if twice else None
        if both is not None and not scaled:  # the first half of what the network sees is y itself
            y, seen = both[: self._shape[0]], both
            start, n = both.data_ptr(), self._elements
            at_y, at_seen = (start, self._code, n), (start + n * self._size, self._code, n)
        else:
            y = self._buffer("y", self._shape)
            seen = both if both is not None else self._buffer("seen", self._shape) if scaled else y
            at_y, at_seen = memory(y), memory(seen) if scaled else None
        self._aim(at_y, at_seen)
        self._y, self._next, self._target = y, seen, target

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self._buffers.get(name) if self._reuse else None
        if found is None:
            found = self._empty(shape, dtype=self.x.dtype)
            if self._reuse:
                self._buffers[name] = found
        return found


def _data(tensor: Tensor) -> Tensor:
    """Contiguous plain memory on the CPU of a floating-point dtype that the kernels read."""
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype not in DATA:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"the model and the noise must give floating-point tensors; got {_kind(tensor)}.")
        if not tensor.is_cpu:
            raise ValueError(f"the model or the noise gave a tensor on {tensor.device}, but x is on the CPU.")
        tensor = tensor.detach().as_subclass(Tensor)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
