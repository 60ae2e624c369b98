"""Whole calls on plain tensors, which ``fastdiff._C`` reads, gathers rows for and makes results of by itself
(csrc/direct.h). A call that is not plain gives None: ``fastdiff.ops`` does it, or refuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...calls import LossCall
from ...torch_access import _C, reads_tensors
from .. import reference
from .launch import FUNCTIONS, memory
from .loss import recorded as _recorded

_threads, _grad = torch.get_num_threads, torch.is_grad_enabled

available = reads_tensors
_reference = reference.backend
_ONE = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def gathered(table: Tensor) -> Any:
    """Rows table[t] of a float64 [steps, columns], t int64."""
    return _source(0, table, 0.0, 0.0)


def rational(columns: Sequence[tuple[float, float, float]], low: float, high: float) -> Any:
    """Rows (a + b t) / (1 + d t), a column for each (a, b, d), of floating-point t in [low, high]."""
    return _source(1, torch.tensor(columns, dtype=torch.float64, device="cpu").T.contiguous(), low, high)


def constant(row: Sequence[float], low: float, high: float) -> Any:
    """The same numbers at every floating-point t in [low, high]."""
    return _source(2, torch.tensor([row], dtype=torch.float64, device="cpu"), low, high)


def _source(kind: int, table: Tensor, low: float, high: float) -> Any:
    table = table.contiguous()
    return _C.row_source(kind, *table.shape, memory(table), low, high)


def times(
    steps: int, seed: int | Tensor, samples: int, stream: int, sample_offset: int, device: torch.device
) -> Tensor | None:
    """floor(steps u), int64, of a uniform u in (0, 1) a sample; u itself, float64, for steps = 0."""
    if device.type != "cpu":
        return None
    out = torch.empty(samples, dtype=torch.int64 if steps else torch.float64, device="cpu")
    return _C.direct_times(out, seed, stream, sample_offset, steps)


def noise(
    source: Any, x0: Tensor, t: Any, n: Tensor | tuple, keep: bool, rng: str = "exact"
) -> tuple[Tensor, Tensor | None] | None:
    """(x_t, the noise that was made and kept), one row (alpha, sigma) a sample. n: the noise, or (seed, stream,
    sample_offset, offset) to make it from; on a CPU there is one way to make it, whatever ``rng``."""
    if not x0.is_cpu:  # where this backend is forced
        return None
    kept = None
    if keep:
        wide = x0.dtype is torch.float64
        kept = torch.empty_like(
            x0, dtype=torch.float64 if wide else torch.float32, memory_format=torch.contiguous_format
        )
    x_t = _C.direct_noise(source, x0, t, n, kept, _threads())
    return None if x_t is None else (x_t, kept)


def loss(
    source: Any,
    present: int,
    function: str,
    prediction: Tensor,
    x0: Tensor | None,
    n: Any,
    t: Any,
    rows: Callable[[], tuple[Tensor | None, ...]],
) -> Tensor | None:
    """The mean loss, one row (p, q, scale, weight, c) a sample, of which the bits of ``present`` say what is used.
    ``rows`` gives them as placed tensors, for a gradient other than the usual one."""
    if n is not None and not isinstance(n, Tensor):
        return None
    recorded = prediction.requires_grad and _grad()
    # A float16 loss is scaled; its gradient for 1 would be of no use.
    ahead = recorded and prediction.dtype is not torch.float16
    wide = torch.float64 in (prediction.dtype, getattr(x0, "dtype", None), getattr(n, "dtype", None))
    one = _ONE[torch.float64 if wide else torch.float32]
    made = _C.direct_loss(source, present, FUNCTIONS[function], prediction, x0, n, t, one, ahead, _threads())
    if made is None or not recorded:
        return None if made is None else made[0]
    value, gradient = made

    def call_of(prediction, x0, n, _):  # t, which the rows are made from, has not changed
        p, q, scale, weight, c = (row if row is None else row.to(value.dtype) for row in rows())
        return LossCall(prediction, x0, n, p, q, scale, weight, c, None, function)

    return _recorded(prediction, None, (value, None, gradient), (prediction, x0, n, t), call_of, _reference)


def convert(source: Any, m: Tensor, x_t: Tensor, t: Any) -> Tensor | None:
    """k_x x_t + k_m m in the dtype of m, one row (k_x, k_m) a sample."""
    return _C.direct_convert(source, m, x_t, t, _threads())


def step(
    x: Tensor, m: Tensor, row: Tensor, clip: float | None, n: Tensor | tuple | None, x0: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(y, x0 estimate) of one row for the whole batch. n as of ``noise``, or None."""
    return _C.direct_step(x, m, row, clip, n, x0, _threads())
