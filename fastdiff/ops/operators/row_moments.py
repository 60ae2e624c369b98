"""Moments of rows, and their gradient, as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends.interface import Backend, able
from ...backends.registry import get
from ...calls import RowMomentsCall
from ...codes import MOMENTS, OF_ONE
from .declaring import declare, strided
from .declaring import run as runs

_UPSTREAM = ", ".join(f"Tensor? of_{name}" for name in MOMENTS)  # no list: PyTorch maps operators over tensors alone
_ARGUMENTS = "Tensor a, Tensor? b, SymInt[] rows, SymInt[] row_shape, ScalarType dtype"


def _call(a: Tensor, b: Tensor | None, rows: Any, row_shape: Any, dtype: torch.dtype) -> RowMomentsCall:
    return RowMomentsCall(a, b, tuple(rows), tuple(row_shape), dtype)


def _fake(a, b, rows, row_shape, dtype):
    return tuple(a.new_empty(row_shape if b is not None or name in OF_ONE else (0,), dtype=dtype) for name in MOMENTS)


@declare("row_moments", f"({_ARGUMENTS}) -> ({', '.join(['Tensor'] * len(MOMENTS))})", _fake)
def _row_moments(a, *arguments):
    call = _call(a, *arguments)
    return tuple(a.new_empty(0, dtype=call.dtype) if total is None else total.contiguous() for total in runs(call, a))


def _fake_gradient(*arguments):
    a, b, *_, for_a, for_b = arguments[len(MOMENTS) :]
    return tuple(torch.empty_like(x) if needed else a.new_empty(0) for x, needed in ((a, for_a), (b, for_b)))


@declare(
    "row_moments_gradient",
    f"({_UPSTREAM}, {_ARGUMENTS}, bool for_a, bool for_b) -> (Tensor, Tensor)",
    _fake_gradient,
)
def _row_moments_gradient(*arguments):
    upstream, (a, b, *shapes), needed = arguments[: len(MOMENTS)], arguments[len(MOMENTS) : -2], arguments[-2:]
    call = _call(a, b, *shapes)
    found = able(get(a.device), call).gradient(upstream, call, *needed)
    return tuple(a.new_empty(0) if d is None else strided(d, x) for d, x in zip(found, (a, b)))


def _context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    a, b, *ctx.shapes = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx, *upstream):
    a, b = ctx.saved_tensors
    if b is None:
        upstream = tuple(factor if name in OF_ONE else None for name, factor in zip(MOMENTS, upstream))
    for_a, for_b, *_ = ctx.needs_input_grad
    d_a, d_b = torch.ops.fastdiff.row_moments_gradient(*upstream, a, b, *ctx.shapes, for_a, for_b)
    return d_a if for_a else None, d_b if for_b else None, None, None, None


torch.library.register_autograd("fastdiff::row_moments", _backward, setup_context=_context)


def declines(call: RowMomentsCall) -> str:
    return ""


def run(call: RowMomentsCall, backend: Backend) -> tuple[Tensor | None, ...]:
    sums = torch.ops.fastdiff.row_moments(*call)
    return tuple(s if call.b is not None or name in OF_ONE else None for name, s in zip(MOMENTS, sums))
