"""A run of steps, prepared once: which rows keep and read history, and what the network is called with next."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...calls import RunCall, StepCall
from ...codes import COLUMNS
from ..interface import Backend, run

_AT = {name: k for k, name in enumerate(COLUMNS)}


class Needs(NamedTuple):
    """What each row of a step table needs.

    Attributes:
        keeps: whether the row makes a history entry.
        reads: how many history entries it reads.
        scales: the factor c_in of the network's next input.
    """

    keeps: list[bool]
    reads: list[int]
    scales: list[float]

    @classmethod
    def of(cls, prepared: Any) -> Needs:
        found = prepared.held.get(cls)
        if found is None:
            table = prepared.table
            used = table != 0
            depth = torch.arange(1, 5, device="cpu")
            keeps = used[:, [_AT["h_x"], _AT["h_m"], _AT["h_x0"]]].any(1).tolist()
            reads = (used[:, _AT["c_h1"] : _AT["c_h4"] + 1] * depth).amax(1).tolist() if len(table) else []
            found = prepared.held[cls] = cls(keeps, reads, table[:, _AT["c_in"]].tolist())
        return found


class Trajectory:
    """The steps of one run, in order. The arguments were checked by ``fastdiff.ops.trajectory``. This class works with
    the ``step`` of any backend; a backend may have a subclass that takes less of the host's time.

    Attributes:
        x: the sample now, [batch, ...].
        seen: the next input of the network: c_in x, twice along the batch for a guided call.
        x0: the x0 estimate of the last step that wanted one.
        captures: whether a CUDA graph can hold a step, as ``backends.cuda.Trajectory.captured``.
    """

    captures = False

    def __init__(self, backend: Backend, call: RunCall):
        x = call.x
        self._backend, self.x, self._run = backend, x, call
        self._placed = call.steps.placed(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        self.keeps, self.reads, self.scales = Needs.of(call.steps)
        self._history: list[Tensor] = []
        self.x0: Tensor | None = None
        self.seen = x

    def begin(self, scale: float, copies: int) -> None:
        """Set ``seen``, the first input of the network, to scale x, ``copies`` times along the batch."""
        seen = self.x if scale == 1 else (scale * self.x.to(self._placed.dtype)).to(self.x.dtype)
        self.seen = torch.cat([seen] * copies) if copies > 1 else seen

    def _refuse_shape(self, m: Tensor, guided: bool) -> None:
        wanted = (2 * len(self.x) if guided else len(self.x), *self.x.shape[1:])
        raise ValueError(f"the model returned shape {tuple(m.shape)} for an input of {wanted}.")

    def _check_noise(self, noise: Tensor) -> None:
        if noise.shape != self.x.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but x {tuple(self.x.shape)}; they must be equal.")

    def step(
        self,
        k: int,
        m: Tensor,
        guided: bool = False,
        noise: Tensor | int | None = None,
        copies: int = 1,
        want_x0: bool = False,
        log_variance: Tensor | None = None,
        threshold: Tensor | None = None,
        row: Tensor | None = None,
        history: tuple[Tensor, ...] | None = None,
    ) -> None:
        """Take step k with the output of the network.

        Args:
            m: the output, [batch, ...]; or [2 batch, ...] if ``guided``, the unconditional half first.
            noise: a tensor [batch, ...]; or the stream of ``philox`` to make it from; or None for no noise.
            copies: how many copies of the result along the batch the network's next input has; 0 makes no input.
            log_variance, threshold, history: see ``fastdiff.ops.step``. A history that is given replaces the one that
                is kept.
            row: coefficients in place of the table's, [K] or [batch, K].
        """
        x, uncond = self.x, None
        if m.shape != (2 * len(x) if guided else len(x), *x.shape[1:]):
            self._refuse_shape(m, guided)
        if isinstance(noise, Tensor):
            self._check_noise(noise)
        elif noise is not None:
            noise = dataclasses.replace(self._run.philox, stream=noise)
        if guided:
            uncond, m = m[: len(x)], m[len(x) :]
        seen = None
        if copies > 1 or (copies and self.scales[k] != 1):
            seen = torch.empty((copies * len(x), *x.shape[1:]), dtype=x.dtype, device=x.device)
        entries = tuple(self._history[: self.reads[k]]) if history is None else history
        of = self._run
        call = StepCall(
            x, m, self._placed[k] if row is None else row, uncond, of.guidance if guided else 1.0, of.clip, entries,
            noise, log_variance, x.dtype, want_x0, self.keeps[k], threshold, of.mask, of.known, of.known_noise, seen,
        )  # fmt: skip
        self.x, x0, entry = run(self._backend, call)
        self.seen = self.x if seen is None else seen
        if want_x0:
            self.x0 = x0
        if entry is not None:
            self._history = [entry, *self._history[:3]]
