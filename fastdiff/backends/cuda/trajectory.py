"""A run of steps on a CUDA device: one call of ``fastdiff._C`` a step, with everything prepared that stays the same.

In a CUDA graph (``captured``) what changes from step to step is on the device: the table with the index of its row, the
seed, and the stream of each row's noise. x, the model's input and the history are overwritten where they are, and the
last block to end adds one to the index. So a replay is the network and one launch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...calls import RunCall, made_from
from ..interface import Backend, differentiable
from ..native.launch import memory
from ..reference import Trajectory as Any_Trajectory
from . import step as on
from .step import made_in_kernel, numbers, of_data, of_mask, one_or_each, plain, repeated, settled, source

Memory = tuple[int, int, int]


class Trajectory(Any_Trajectory):
    """As ``reference.Trajectory``. A step that the kernel does not do goes through the backend's ``step``."""

    def __init__(self, backend: Backend, call: RunCall):
        super().__init__(backend, call)
        x, _, guidance, clip, mask, known, known_noise, philox, reuse = call
        self._clip, self._philox, self._reuse = clip, philox, reuse
        placed = self._placed
        self._prepared = (
            on.built
            and plain(x, placed, guidance, mask, known, known_noise, *made_from(known_noise))
            and of_data(x, known, known_noise)
            and placed.dtype == torch.float32
            and (mask is None or mask.dtype in on.MASKS)
            and one_or_each(guidance, x)
            and 0 < x.numel() < on.MOST
            and x.is_contiguous()
            and not differentiable(x, guidance, mask, known, known_noise)
            and not on.unfit_because(x.device)
        )
        if not self._prepared:
            return
        self._device, self._shape = on.ordinal(x), x.shape
        # What is pointed at is held here.
        self._rows = placed.contiguous()
        self._scales = guidance.contiguous() if isinstance(guidance, Tensor) else guidance
        self._repeated = repeated(mask, x)
        self._given = known if known is None else known.contiguous()
        self._given_noise = settled(known_noise, x, backend.otherwise)
        first, columns = self._rows.data_ptr(), self._rows.shape[1]
        self._layout = (x.shape[0], x.numel() // x.shape[0])
        self._row = [(first + 4 * columns * k, 0, columns) for k in range(len(self._rows))]
        self._numbers = numbers(self._scales)
        self._inpainting = of_mask(self._repeated), memory(self._given), source(self._given_noise)
        self._kept = memory(x)
        self._buffers: dict[Any, tuple[Tensor, Memory]] = {}
        self._depth = max(self.reads, default=0)
        self._past: list[Memory] = []  # of the history
        self._outs = [(n * x.shape[0], *x.shape[1:]) for n in (1, 2)]
        # What streams of the noise are made from; None: each step settles that.
        self._key: Any = None
        if philox is not None and made_in_kernel(philox) and plain(philox.seed):
            seed = philox.seed
            self._key = memory(seed) if isinstance(seed, Tensor) else int(seed)

    @property
    def captures(self) -> bool:
        """Whether ``prepare_capture`` and ``captured`` can be used."""
        return self._prepared

    def _buffer(self, name: str, k: int, batch: int) -> tuple[Tensor, Memory]:
        """The output buffer ``name`` of step k: x, or the next input of the network. Two buffers take turns if a step
        may write over earlier results; otherwise each step has a new one."""
        key = name, k % 2, batch
        found = self._buffers.get(key) if self._reuse else None
        if found is None or found[0] is self.x:
            made = torch.empty((batch, *self._shape[1:]), dtype=self.x.dtype, device=self.x.device)
            found = made, memory(made)
            if self._reuse:
                self._buffers[key] = found
        return found

    def _entry(self, k: int) -> tuple[Tensor, Memory] | None:
        """Memory for the entry that step k makes: that of the oldest once there are as many as are read. It is read,
        element by element, before it is overwritten."""
        if not self.keeps[k] or not self._depth:
            return None
        if len(self._history) < self._depth:
            made = torch.empty(self._shape, dtype=torch.float32, device=self.x.device)
            return made, memory(made)
        return self._history[-1], self._past[-1]

    @staticmethod
    def _outputs(m: Tensor, guided: bool) -> tuple[Memory, Memory | None]:
        """The network's output and its unconditional one: of a guided call the halves, the unconditional first."""
        first, code, count = memory(m)
        if not guided:
            return (first, code, count), None
        half = count // 2
        return (first + m.element_size() * half, code, half), (first, code, half)

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
        if (
            not self._prepared
            or not (log_variance is threshold is row is history is None)
            or type(m) is not Tensor
            or not on.on_device(m)
            or m.dtype not in on.DATA
            or on.wrapping() is not None
            or differentiable(m)
        ):
            self._step_elsewhere(k, m, guided, noise, copies, want_x0, log_variance, threshold, row, history)
            return
        if m.shape != self._outs[guided]:
            self._refuse_shape(m, guided)
        made: Any = None
        if type(noise) is int and self._key is not None:
            made = self._key, noise, self._philox.sample_offset, 0.0
        elif noise is not None:
            if type(noise) is int:
                noise = dataclasses.replace(self._philox, stream=noise)
            else:
                self._check_noise(noise)
            if not plain(noise, *made_from(noise)) or not of_data(noise) or differentiable(noise):
                self._step_elsewhere(k, m, guided, noise, copies, want_x0, None, None, None, None)
                return
            noise = settled(noise, self.x, self._backend.otherwise)  # held until the launch
            made = source(noise)
        m = m.contiguous()
        output, uncond = self._outputs(m, guided)
        seen, at_seen = None, None
        if copies > 1 or (copies and self.scales[k] != 1):
            seen, at_seen = self._buffer("seen", k, copies * self._shape[0])
        y, to = self._buffer("x", k, self._shape[0])
        x0 = torch.empty_like(self.x) if want_x0 else None
        entry = self._entry(k)
        on._C.cuda_step(
            self._device,
            on.queue(self._device),
            self._layout,
            self._row[k],
            None,
            None,
            self._kept,
            output,
            uncond,
            self._numbers if guided else 1.0,
            self._clip,
            None,
            tuple(self._past[: self.reads[k]]),
            False,
            made,
            None,
            *self._inpainting,
            to,
            memory(x0),
            None if entry is None else entry[1],
            at_seen,
        )
        self.x, self._kept = y, to
        self.seen = y if seen is None else seen
        if want_x0:
            self.x0 = x0
        if entry is not None:
            self._history = [entry[0], *self._history[: self._depth - 1]]
            self._past = [entry[1], *self._past[: self._depth - 1]]

    def _step_elsewhere(self, *arguments: Any) -> None:
        """A step through the backend's ``step``, for arguments that the kernel does not take."""
        super().step(*arguments)
        if self._prepared:
            self.x = self.x.contiguous()
            self._kept = memory(self.x)
            self._history = [entry.contiguous() for entry in self._history[: self._depth]]
            self._past = [memory(entry) for entry in self._history]

    def captured(
        self,
        index: Tensor,
        ticket: Tensor,
        m: Tensor,
        guided: bool = False,
        noise: Any = None,
        streams: Tensor | None = None,
        copies: int = 1,
    ) -> None:
        """Launch step ``index`` on memory that stays where it is, for a CUDA graph that holds model and step once and
        is replayed for each: x, seen and the history are overwritten, and the index is one more when it has run.

        Call ``prepare_capture`` first. Rows whose noise is not wanted must have a c_noise of 0.

        Args:
            index, ticket: int64 [1] on the device: the step, and 0, which the kernel counts its blocks with.
            m, guided, copies: as for ``step``; the same at every replay.
            noise: a tensor, or a ``Philox``; None for none.
            streams: int64 [steps] on the device: the stream of the noise at each step, in place of the Philox's.

        Raises RuntimeError for a trajectory that the kernel does not do.
        """
        if not self._prepared or not plain(m, noise, streams, index, ticket) or not of_data(m, noise):
            raise RuntimeError("a captured step needs a CUDA device and float32, bfloat16 or float16 data.")
        if not m.is_contiguous():
            raise RuntimeError("a captured step needs the network's output to be contiguous.")
        if m.shape != ((2 if guided else 1) * self._shape[0], *self._shape[1:]):
            self._refuse_shape(m, guided)
        output, uncond = self._outputs(m, guided)
        seen = None if self.seen is self.x else self.seen
        if len(self.seen) != max(copies, 1) * len(self.x):
            raise RuntimeError(f"prepare_capture was not called for {copies} copies.")
        on._C.cuda_step(
            self._device,
            on.queue(self._device),
            self._layout,
            memory(self._rows),
            memory(index),
            memory(ticket),
            self._kept,
            output,
            uncond,
            self._numbers if guided else 1.0,
            self._clip,
            None,
            tuple([memory(t) for t in self._history]),
            bool(self._history),
            source(noise, streams),
            None,
            *self._inpainting,
            self._kept,
            memory(self.x0),
            None,
            memory(seen),
        )

    def prepare_capture(self, scale: float = 1.0, copies: int = 1, want_x0: bool = False) -> None:
        """Give x, seen and the history memory of their own, which ``captured`` overwrites, and fill seen with scale x,
        ``copies`` times along the batch. ``want_x0``: x0 too, for the estimates."""
        if not self._prepared:
            raise RuntimeError("a captured step needs a CUDA device and float32, bfloat16 or float16 data.")
        self.x = self.x.clone()
        self._kept = memory(self.x)
        self._history = [
            torch.zeros(self._shape, dtype=torch.float32, device=self.x.device)
            for _ in range(max(self.reads, default=0))
        ]
        self.begin(scale, copies)
        if copies > 1 or any(scale != 1 for scale in self.scales):
            self.seen = self.seen.clone() if self.seen is self.x else self.seen
        self.x0 = torch.empty_like(self.x) if want_x0 else None

    @property
    def changed(self) -> list[Tensor]:
        """The tensors that ``captured`` writes and a later step reads, without the index."""
        return [self.x, *([] if self.seen is self.x else [self.seen]), *self._history]
