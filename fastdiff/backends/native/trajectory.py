"""A run of steps on the CPU: pointers and buffers are found once, so that a step is one call with little before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import operations
from .launch import DTYPES, arrange, masked, memory, source

_NOISE = reference.COLUMNS.index("c_noise")


class Trajectory(reference.Trajectory):
    """As ``reference.Trajectory``, one launch of the native step a row."""

    def __init__(self, step, x, table, placed, guidance, clip, mask, known, known_noise, reuse):
        super().__init__(step, x, table, placed, guidance, clip, mask, known, known_noise, reuse)
        given = (x, placed, guidance, mask, known, known_noise, getattr(known_noise, "seed", None))
        self._prepared = operations._plain(*given) and x.is_contiguous() and x.numel() > 0
        if not self._prepared:
            return
        self._shape, self._both = x.shape, (2 * len(x), *x.shape[1:])
        self._elements, self._code, self._size = x.numel(), DTYPES[x.dtype], x.element_size()
        one = placed.new_empty(1)
        samples = one.expand((len(x),) + (1,) * (x.ndim - 1))
        if not isinstance(guidance, Tensor):
            guidance = placed.new_full((1,), guidance)
        self._layout, (rows,) = arrange(x.shape, guidance)
        self._sample_layout, (_, sample_rows) = arrange(x.shape, samples, guidance)
        row_bytes = placed.shape[1] * placed.element_size()
        start, code, width = placed.data_ptr(), DTYPES[placed.dtype], placed.shape[1]
        self._rows = [(start + k * row_bytes, code, width) for k in range(len(placed))]
        self._scale, self._sample_scale = memory(rows), memory(sample_rows)
        known = None if known is None else known.contiguous()
        known_noise = known_noise.contiguous() if isinstance(known_noise, Tensor) else known_noise
        self._inpainting = masked(mask, x.shape), memory(known), source(known_noise)
        self._held = placed, rows, sample_rows, mask, known, known_noise  # what is pointed at must live
        self._noisy = [row[_NOISE] != 0 for row in table.tolist()]
        self._threads = torch.get_num_threads()
        self._x = memory(x)
        self._buffers: dict[Any, tuple] = {}
        self._turn = False
        count = max(self.reads, default=0)
        self._ring = [torch.empty(x.shape, dtype=placed.dtype) for _ in range(count + 1)] if count else []
        self._entries: list[tuple[int, int, int]] = []  # of the history, the latest first
        self._free = [memory(entry) for entry in self._ring]

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
        m = _data(m)
        pointer, code, elements = m.data_ptr(), DTYPES[m.dtype], self._elements
        uncond = scale = None
        layout = self._layout
        if guided:
            uncond, scale = (pointer, code, elements), self._scale
            pointer += elements * m.element_size()
        held = None
        at = self._rows[k]
        if (
            row is not None
            or threshold is not None
            or log_variance is not None
            or history is not None
            or noise is not None
        ):
            if row is not None or threshold is not None:
                layout = self._sample_layout
                if guided:
                    scale = self._sample_scale
            held = [t if t is None else t.contiguous() for t in (row, threshold)]
            held += [t if t is None else _data(t) for t in (log_variance, *(history or ()))]
            if row is not None:
                at = memory(held[0])
            if isinstance(noise, Tensor):
                noise = _data(noise)
                held.append(noise)
                noise = memory(noise)
            elif noise is not None:
                drawn = self._noisy[k] or log_variance is not None
                noise = (int(noise.seed), noise.stream, noise.sample_offset, noise.offset) if drawn else None
        y, written, seen, target = self._outputs(k, copies)
        x0 = torch.empty(self._shape, dtype=y.dtype) if want_x0 else None
        entry = self._free.pop() if self.keeps[k] and self._ring else None
        operations._C.step(
            layout,
            self._x,
            (pointer, code, elements),
            uncond,
            scale,
            at,
            self._clip,
            tuple(self._entries[: self.reads[k]])
            if history is None
            else tuple(memory(t) for t in held[3:][: len(history)]),
            noise,
            None if log_variance is None else memory(held[2]),
            written,
            None if x0 is None else memory(x0),
            entry,
            None if threshold is None else memory(held[1]),
            *self._inpainting,
            target,
            self._threads,
        )
        self.x, self._x, self.seen = y, written, seen
        if x0 is not None:
            self.x0 = x0
        if entry is not None:
            self._entries.insert(0, entry)
            if not self._free:
                self._free.append(self._entries.pop())

    def _outputs(self, k: int, copies: int) -> tuple[Tensor, tuple, Tensor, tuple | None]:
        """(y, its memory, what the network sees next, the memory of that as far as it is not y)."""
        scaled = copies > 0 and self.scales[k] != 1
        if not self._reuse:
            return self._made(copies, scaled)
        self._turn = not self._turn
        key = self._turn, copies > 1, scaled
        found = self._buffers.get(key)
        if found is None:
            found = self._buffers[key] = self._made(copies, scaled)
        return found

    def _made(self, copies: int, scaled: bool) -> tuple[Tensor, tuple, Tensor, tuple | None]:
        dtype, n = self.x.dtype, self._elements
        if copies > 1 and not scaled:  # the first half of what the network sees is y itself
            seen = torch.empty(self._both, dtype=dtype)
            start = seen.data_ptr()
            y = seen[: len(self.x)]
            return y, (start, self._code, n), seen, (start + n * self._size, self._code, n)
        y = torch.empty(self._shape, dtype=dtype)
        if not scaled:
            return y, memory(y), y, None
        seen = torch.empty(self._both if copies > 1 else self._shape, dtype=dtype)
        return y, memory(y), seen, memory(seen)


def _data(tensor: Tensor) -> Tensor:
    """Contiguous plain memory on the CPU of a floating-point dtype that the kernels read."""
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype not in operations._DATA:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"the model and the noise must give floating-point tensors; got {_kind(tensor)}.")
        if not tensor.is_cpu:
            raise ValueError(f"the model or the noise gave a tensor on {tensor.device}, but x is on the CPU.")
        tensor = tensor.detach().as_subclass(Tensor)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
