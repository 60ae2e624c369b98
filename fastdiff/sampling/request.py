"""The record of a run: the arguments of ``fastdiff.sample``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..guidance import Rule
from ..prediction import Prediction
from ..process import Process
from ..samplers import Sampler


class TrainedOn(Protocol):
    """What a network was trained on, as an ``Objective`` has it."""

    process: Process
    prediction: Prediction


class Request(NamedTuple):
    """The arguments of ``fastdiff.sample``, which says what each of them means."""

    model: Callable[..., Tensor]
    shape: tuple[int, ...]
    process: Process | TrainedOn
    sampler: str | Sampler
    steps: int | None
    prediction: str | Prediction | None
    cond: Any  # tensors [batch, ...] or [1, ...]
    uncond: Any
    guidance: float | Tensor | Rule  # a number, or [batch]
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float
    dynamic_thresholding: float | None
    sample_max_value: float | None
    cond_fn: Callable[[Tensor, Tensor], Tensor] | None
    known: Tensor | None  # broadcasts to ``shape``, as the mask
    mask: Tensor | None
    seed: int | Tensor | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    noise: Callable[[int, tuple[int, ...]], Tensor] | None
    x: Tensor | None  # of ``shape``
    sample_offset: int | Tensor | None
    ids: Tensor | None
    step_offset: int
    device: torch.device | str | None
    dtype: torch.dtype
    progress: bool
    callback: Callable[[int, Tensor, Tensor, Tensor], None] | None
    return_trajectory: bool
    compile: bool
    cuda_graph: bool
