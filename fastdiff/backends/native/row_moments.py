"""Moments of rows on the CPU, and their gradient: one pass each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...calls import RowMomentsCall
from ...codes import DTYPES, MOMENTS, OF_ONE
from ...torch_access import _C
from .. import moments
from ..interface import Backend
from ..layout import layout_of
from .launch import empty, memory, unsuited


def declines(call: RowMomentsCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    return unsuited(call.a, call.b) or moments.fits(call)


def run(call: RowMomentsCall, backend: Backend) -> tuple[Tensor | None, ...]:
    """See ``RowMomentsCall``."""
    return moments.run(call, backend, _launch)


def _launch(call: RowMomentsCall) -> tuple[Tensor | None, ...]:
    laid = moments.lay(call)
    a, b, dtype = laid.a, laid.b, call.dtype
    sums = [a.new_empty(laid.row_shape, dtype=dtype) if b is not None or name in OF_ONE else None for name in MOMENTS]
    layout, _ = layout_of(tuple(a.shape), laid.rows)
    results = tuple(memory(total) for total in sums)
    _C.row_moments(layout, memory(a), memory(b), DTYPES[dtype], results, torch.get_num_threads())
    return tuple(None if total is None else laid.rows_as_asked(total, call) for total in sums)


def gradient(
    upstream: Sequence[Tensor | None], call: RowMomentsCall, backend: Backend, for_a: bool, for_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """See ``Backend.gradient``."""
    laid = moments.lay(call)
    layout, _ = layout_of(tuple(laid.a.shape), laid.rows)
    rows = [laid.rows_as_laid(factor, call) for factor in upstream]  # held until the call returns
    d_a, d_b = (empty(x.shape, x.dtype, x) if wanted else None for x, wanted in ((laid.a, for_a), (laid.b, for_b)))
    factors = tuple(memory(row) for row in rows)
    threads = torch.get_num_threads()
    _C.row_moments_gradient(layout, memory(laid.a), memory(laid.b), factors, memory(d_a), memory(d_b), threads)
    return laid.as_asked(d_a), laid.as_asked(d_b)
