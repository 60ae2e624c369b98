"""Sampling under a CUDA graph: the network and the step are captured once, and replayed for every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .guidance import Guidance
from .samplers import Plan


def check_capture(device: torch.device, plan: Plan, how: Guidance) -> None:
    """Raise ValueError unless this run can be captured: a step must be the same launches for every row."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device; got {device}. Leave it out, or use compile=True.")
    if not how.plain:
        raise ValueError("cuda_graph=True excludes guidance_rescale, dynamic_thresholding and cond_fn.")
    if len(set(how.guided)) > 1:
        raise ValueError("cuda_graph=True excludes a guidance_interval: the batch that the network sees would change.")
    if plan.learned_variance:
        raise ValueError("cuda_graph=True excludes a learned variance.")


class Graphed:
    """Network and step as one CUDA graph. All that changes from row to row lies in tensors that are written before a
    replay: the row itself, the time, the noise.

    Args:
        model: the network.
        x: where to start.
        table: float64 [steps, K].
        times: what the network is told at each row.
        cond, guided: the network's condition or None, and whether its batch has an unconditional half.
        scale: of x for the first call.
        how: clip, guidance, mask, known, known_noise: of ``fastdiff.ops.step``.
    """

    def __init__(
        self,
        model: Any,
        x: Tensor,
        table: Tensor,
        times: list[Tensor],
        cond: Any,
        guided: bool,
        scale: float,
        **how: Any,
    ):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._table, self._times = table.to(x.device, wide), times
        first = ops.COLUMNS.index("c_h1")
        count = max((j + 1 for j in range(4) if bool(table[:, first + j].any())), default=0)
        self._history = [torch.zeros_like(x, dtype=wide) for _ in range(count)]
        self.x, self.x0 = x.clone(), torch.empty_like(x)
        copies = 2 if guided else 1
        seen = (scale * x.to(wide)).to(x.dtype)
        self._seen = torch.cat([seen] * copies)
        self._row, self._time = self._table[0].clone(), times[0].clone()
        self._z = torch.zeros_like(x, dtype=wide)

        def body() -> None:
            m = model(self._seen, self._time) if cond is None else model(self._seen, self._time, cond)
            uncond = None
            if guided:
                uncond, m = m.chunk(2)
            y, x0, entry = ops.step(
                self.x, m, self._row, uncond=uncond, history=self._history, noise=self._z, model_input=self._seen, **how
            )
            self.x.copy_(y)
            self.x0.copy_(x0)
            for k in reversed(range(1, len(self._history))):
                self._history[k].copy_(self._history[k - 1])
            if self._history:
                self._history[0].copy_(entry)

        started = [self.x.clone(), self._seen.clone()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a few calls first, as torch.cuda.graph asks for
            for _ in range(3):
                body()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            body()
        for tensor, before in zip((self.x, self._seen), started):
            tensor.copy_(before)
        for entry in self._history:
            entry.zero_()

    def step(self, k: int, noise: Any) -> None:
        """Row k: everything on the device, nothing waited for."""
        self._row.copy_(self._table[k])
        self._time.copy_(self._times[k])
        if noise is not None:
            self._z.copy_(noise if isinstance(noise, Tensor) else noise.tensor(self.x.shape, self.x.device))
        self._graph.replay()
