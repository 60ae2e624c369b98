"""Whole calls on plain tensors, which ``fastdiff._C`` reads, gathers rows for and makes results of by itself
(csrc/direct.h). A call that is not plain gives None: ``fastdiff.ops`` does it, or refuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import modes
from ...torch_access import _C, reads_tensors
from .. import reference
from ..saving import save, saved
from .launch import FUNCTIONS, memory
from .operations import _launch_loss

_threads, _grad = torch.get_num_threads, torch.is_grad_enabled

available = reads_tensors
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
    return _apply(prediction, (made, x0, n, t, rows, function))


class _Loss(torch.autograd.Function):
    """A loss that is known, with its gradient for an upstream gradient of 1. For another it is computed again with
    that one in it before any rounding."""

    @staticmethod
    def forward(ctx, prediction, known):
        (value, ctx.gradient), x0, n, t, ctx.rows, ctx.function = known
        save(ctx, prediction, x0, n, t)
        return value

    @staticmethod
    def backward(ctx, upstream):
        graph = torch.is_grad_enabled()  # of the gradient
        gradient, ctx.gradient = ctx.gradient, None
        plain = not modes.is_many(upstream)
        if gradient is not None and not graph and plain and float(upstream) == 1.0:
            return gradient, None
        prediction, x0, n, _ = saved(ctx)  # t, which the rows are made from, has not changed
        p, q, scale, weight, c = (row if row is None else row.to(upstream.dtype) for row in ctx.rows())
        rest = (c, None, ctx.function, "none", "mean")
        if graph:
            loss = reference.loss(prediction, x0, n, p, q, scale, weight, *rest)
            return torch.autograd.grad(loss, prediction, upstream, create_graph=True)[0], None
        if not plain:  # several at once
            return reference.loss_gradient(upstream, prediction, x0, n, p, q, scale, weight, *rest), None
        arguments = (prediction, weight, x0, n, p, q, scale, *rest)
        return _launch_loss(*arguments, upstream=upstream, result=False, gradient=True)[2], None


# What Function.apply comes to where no transform is at work, which the call has seen to.
_apply = super(torch.autograd.Function, _Loss).apply


def convert(source: Any, m: Tensor, x_t: Tensor, t: Any) -> Tensor | None:
    """k_x x_t + k_m m in the dtype of m, one row (k_x, k_m) a sample."""
    return _C.direct_convert(source, m, x_t, t, _threads())


def step(
    x: Tensor, m: Tensor, row: Tensor, clip: float | None, n: Tensor | tuple | None, x0: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(y, x0 estimate) of one row for the whole batch. n as of ``noise``, or None."""
    return _C.direct_step(x, m, row, clip, n, x0, _threads())
