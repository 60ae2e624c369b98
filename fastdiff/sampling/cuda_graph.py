"""Sampling under a CUDA graph: the network and the step are captured once, and replayed for every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..samplers import Plan
from .guidance import Guidance

_ENTRY = slice(ops.COLUMNS.index("h_x"), ops.COLUMNS.index("h_x0") + 1)


def check_capture(device: torch.device, plan: Plan, guidance: Guidance) -> None:
    """Raise ValueError unless this run can be captured: a step must be the same launches for every row."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device; got {device}. Leave it out, or use compile=True.")
    if guidance.looks:
        raise ValueError(
            "cuda_graph=True excludes guidance_rescale, rules of guidance, dynamic_thresholding, cond_fn and "
            "PredictorCorrector: leave it out, or use compile=True."
        )
    if len(set(guidance.guided)) > 1:
        raise ValueError(
            "cuda_graph=True excludes a guidance_interval, by which the batch that the network sees changes: leave one "
            "out."
        )
    if plan.learned_variance:
        raise ValueError("cuda_graph=True excludes a learned variance: leave it out, or use compile=True.")


class Graphed:
    """Network and step as one CUDA graph. What changes from row to row is on the device: the graph counts its own
    replays, and takes the row, the time and the noise's stream that belong to the count. With the CUDA backend the
    step is one launch, which counts too; with another it is that backend's step and what moves its results in place.

    Args:
        model: the network.
        x: where to start.
        rows: the table.
        model_time: what the network is given as t, [rows], on the device.
        cond, guided: the network's condition or None, and whether its batch has an unconditional half.
        scale: of x for the first call.
        draws, streams, philox: which rows add noise, and of which streams of ``philox``; streams None: noise is given.
        want_x0: keep the x0 estimate.
        how: clip, guidance, mask, known, known_noise: of ``fastdiff.ops.step``.

    Attributes:
        x, x0: the sample and the x0 estimate now; the next step writes over them.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        rows: ops.PreparedSteps,
        model_time: Tensor,
        cond: Any,
        guided: bool,
        scale: float,
        draws: Sequence[bool],
        streams: Sequence[int | None] | None,
        philox: ops.Philox | None,
        want_x0: bool,
        **how: Any,
    ):
        self._philox = philox
        index = torch.zeros(1, dtype=torch.int64, device=x.device)

        def predicted(seen: Tensor) -> Tensor:
            t = model_time.index_select(0, index).expand(len(seen))
            m = model(seen, t) if cond is None else model(seen, t, cond)
            if m.shape != seen.shape:
                raise ValueError(f"the model returned shape {tuple(m.shape)} for an input of {tuple(seen.shape)}.")
            return m.contiguous()

        rows = ops.PreparedSteps(_drawn_only(rows.table, draws))
        run = ops.trajectory(x, rows, **how)
        # Noise that is not made in the step lies here; what is not drawn has a coefficient of 0.
        inside = run.captures and streams is not None
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._z = torch.zeros_like(x, dtype=wide) if any(draws) and not inside else None
        if run.captures:
            run.prepare_capture(scale, 1 + guided, want_x0)
            noise = philox if any(draws) and inside else self._z
            body, changed = _one_launch(run, predicted, guided, index, noise, streams), run.changed
            self.x, self.x0 = run.x, run.x0
        else:
            seen = torch.cat([(scale * x.to(wide)).to(x.dtype)] * (1 + guided))
            self.x, self.x0 = x.clone(), torch.empty_like(x) if want_x0 else None
            history = [torch.zeros_like(x, dtype=wide) for _ in range(max(run.reads, default=0))]
            table = rows.placed(x.device, wide)
            body = _any_backend(self.x, self.x0, seen, history, predicted, index, table, self._z, how)
            changed = [self.x, seen, *history]
        before = [(tensor, tensor.clone()) for tensor in (*changed, index)]

        def begin() -> None:
            for tensor, first in before:
                tensor.copy_(first)

        self._replay = record(body, begin, x.device)
        self._held = body  # and all that the graph reads and writes
        self._seen, self._scales = run.seen if run.captures else seen, run.scales

    def step(self, noise: Tensor | int | None) -> None:
        """The next row, with the noise that it adds: a tensor, or the stream that it is made from. Everything is on
        the device, nothing is waited for."""
        if noise is not None and self._z is not None:
            if not isinstance(noise, Tensor):
                made = dataclasses.replace(self._philox, stream=noise)
                noise = ops.materialize(made, self.x.shape, self.x.device)
            self._z.copy_(noise)
        self._replay()

    def put(self, k: int, x: Tensor) -> None:
        """Go on from ``x`` after row k."""
        self.x.copy_(x)
        if self._seen is not self.x:
            scaled = (self._scales[k] * x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
            for part in self._seen.split(len(x)):
                part.copy_(scaled)


def _one_launch(run, predicted, guided, index, noise, streams) -> Callable[[], None]:
    """Network and step where the backend's step is one launch, on what ``run.prepare_capture`` made."""
    ticket, of_row = torch.zeros_like(index), None
    if isinstance(noise, ops.Philox):
        of_row = torch.tensor([stream or 0 for stream in streams], dtype=torch.int64, device=index.device)

    def body() -> None:
        run.captured(index, ticket, predicted(run.seen), guided, noise, of_row, 1 + guided)

    return body


def _any_backend(x, x0, seen, history, predicted, index, table, z, how) -> Callable[[], None]:
    """Network and step where it is not: the results are moved to where they came from."""

    def body() -> None:
        m, uncond = predicted(seen), None
        if len(seen) > len(x):
            uncond, m = m.chunk(2)
        row = table.index_select(0, index)[0]
        y, estimate, entry = ops.step(
            x, m, row, uncond=uncond, history=history, noise=z, model_input=seen, return_x0=x0 is not None,
            return_entry=bool(history), **how,
        )  # fmt: skip
        x.copy_(y)
        if x0 is not None:
            x0.copy_(estimate)
        keeps = (row[_ENTRY] != 0).any()
        for k, newer in reversed(list(enumerate([entry, *history[:-1]][: len(history)]))):
            history[k].copy_(torch.where(keeps, newer, history[k]))
        index.add_(1)

    return body


def _drawn_only(table: Tensor, draws: Sequence[bool]) -> Tensor:
    """The table without the noise of rows that draw none: in a graph every row has the noise at hand."""
    drawn = torch.tensor(draws, dtype=torch.bool, device="cpu")
    table = table.clone()
    table[~drawn, ops.COLUMNS.index("c_noise")] = 0
    return table


def record(body: Callable[[], None], begin: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture ``body`` in a CUDA graph, and return what replays it. ``begin`` puts all that the body changes back to
    where it was: the body is run a few times first, on another stream, as torch.cuda.graph asks for."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                begin()
                body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Its own choice would be one stream for all devices, of the first that anything was captured on.
        with torch.cuda.graph(graph, stream=side):
            body()
        begin()
    return graph.replay
