"""The observers of a run: the callback, and the trajectory that is returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..samplers import Plan
from .request import Request


class Watcher:
    """Shows what every step of a run gives. A step may take several rows of the plan, and is shown after its last.

    Args:
        steps: what takes the steps: a run of ``ops.trajectory``, or a ``Graphed``, which writes over its results.
    """

    def __init__(self, request: Request, plan: Plan, steps: Any):
        self._callback, self._steps, self._writes_over = request.callback, steps, request.cuda_graph
        self._times = plan.times.to(request.device) if request.callback is not None else plan.times
        self._index = range(len(plan.times)) if plan.steps is None else plan.steps
        self._first_row = 0  # of the step that is being taken
        self._path = [self._kept(steps.x)] if request.return_trajectory else None

    def ends(self, k: int) -> bool:
        """Whether row k is the last of its step."""
        return k + 1 == len(self._index) or self._index[k + 1] != self._index[k]

    def wants_x0(self, k: int) -> bool:
        """Whether the x0 estimate of row k is shown."""
        return self._callback is not None and self.ends(k)

    def show(self, k: int, copies: int) -> None:
        """After row k: the end of a step is shown, and what the callback writes into x is what the run goes on from.
        ``copies``: how often the network is to see x next."""
        if not self.ends(k):
            return
        steps = self._steps
        if self._path is not None:
            self._path.append(self._kept(steps.x))
        if self._callback is not None:
            x = self._kept(steps.x)
            self._callback(self._index[k], self._times[self._first_row], x, self._kept(steps.x0))
            if self._writes_over:
                steps.put(k, x)
            elif copies and steps.seen is not steps.x:
                steps.begin(steps.scales[k], copies)
        self._first_row = k + 1

    def trajectory(self) -> Tensor:
        """x at the start and after every step, [steps + 1, batch, ...]."""
        assert self._path is not None
        return torch.stack(self._path)

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self._writes_over else tensor
