"""The noise of a run: from a seed, from one generator a sample, or from a function of the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import ops, torch_randn
from ..ops.checks import check_floating
from ..philox import Philox, Stream, draw_seed
from ..samplers import Plan
from .request import Request


def check_seeds(seed: Any, generator: Any, batch: int) -> Any:
    """``generator``, several of them as a list. Raises ValueError where there is a seed too, or not one a sample."""
    if seed is not None and generator is not None:
        raise ValueError("pass a seed or a generator, not both.")
    if not hasattr(generator, "__iter__"):
        return generator
    generators = list(generator)
    if len(generators) != batch:
        raise ValueError(f"{len(generators)} generators for {batch} samples: one each is needed.")
    return generators


class NoiseSource:
    """The noise of one run: of its start, and of each row of its plan.

    Attributes:
        initial: the noise that sampling starts from, which is also the noise of known data: a tensor of the samples'
            shape, or the ``Philox`` to make it from; None if neither is needed.
        philox: the ``Philox`` that makes the noise of rows, if it is made from a seed.
        streams: for each row the stream of ``philox`` that it adds, or None if it adds no noise. None in place of the
            list if rows add tensors, which ``step`` gives: noise that is given, and that of a plan whose steps depend
            on it.
    """

    def __init__(self, request: Request, plan: Plan):
        self._request, self._draws = request, plan.draws
        self._generators = request.generator if isinstance(request.generator, list) else None
        # Churn is drawn for the step that comes next.
        self._first = request.step_offset
        later = self._first if plan.start is None else self._first + 1
        self._steps = [k + later for k in (range(len(plan.times)) if plan.steps is None else plan.steps)]
        given = request.noise is not None or self._generators is not None
        draws = any(plan.draws) or (plan.start is not None and plan.start[1] > 0)
        begins = request.x is None or request.mask is not None
        self.initial: Tensor | Philox | None = None
        self.philox: Philox | None = None
        if self._generators is not None:
            self.initial = self._drawn(self._generators) if begins else None
        elif begins or (draws and not given):
            seed = draw_seed(request.generator, request.device) if request.seed is None else request.seed
            if isinstance(seed, Tensor) and seed.device.type == "cpu":
                seed = int(seed)
            self.initial = self.philox = Philox(seed, request.sample_offset, Stream.INITIAL)
        self.streams: list[int | None] | None = None
        if not (draws and given) and plan.langevin is None:
            self.streams = [Stream.STEP + k if drawn else None for k, drawn in zip(self._steps, plan.draws)]

    def step(self, k: int) -> Tensor | None:
        """The noise that row k adds, where there are no ``streams``."""
        return self._of(self._steps[k]) if self._draws[k] else None

    def churn(self) -> Tensor:
        """The noise of the plan's start."""
        return self._of(self._first)

    def _of(self, step: int) -> Tensor:
        """The noise of a step: by the function, by the generators, or from the seed."""
        if self._request.noise is not None:
            noise = self._request.noise(step, self._request.shape)
            check_floating(noise=noise)
            if noise.shape != self._request.shape:
                raise ValueError(
                    f"noise has shape {tuple(noise.shape)}, but x {tuple(self._request.shape)}; they must be equal."
                )
            return noise.to(self._request.device)
        if self._generators is not None:
            return self._drawn(self._generators)
        philox = dataclasses.replace(self.philox, stream=Stream.STEP + step)
        return ops.materialize(philox, self._request.shape, self._request.device)

    def _drawn(self, generators: list[torch.Generator]) -> Tensor:
        shape, device = self._request.shape, self._request.device
        wide = torch.float64 if self._request.dtype == torch.float64 else torch.float32
        drawn = [torch_randn.randn(shape[1:], generator=g, dtype=wide, device=g.device) for g in generators]
        none = torch.empty(shape, dtype=wide, device=device)
        return torch.stack([z.to(device) for z in drawn]) if drawn else none
