"""Moments of rows, and their gradient without autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...calls import RowMomentsCall
from ...codes import MOMENTS
from ..interface import Backend
from .error_functions import Error, error_derivative
from .loss import sum_rows


def declines(call: RowMomentsCall) -> str:
    return ""


def run(call: RowMomentsCall, backend: Backend) -> tuple[Tensor | None, ...]:
    """See ``RowMomentsCall``."""
    a, b, s = _operands(call)
    if b is None:
        moments = (a * a, None, None, None, _size(a), None, a, None)
    else:
        moments = (a * a, a * b, b * b, s * s, _size(s), _size(b), a, b)
    return tuple(
        None if values is None else sum_rows(values, call.rows).to(call.dtype).reshape(call.row_shape)
        for values in moments
    )


def gradient(
    upstream: Sequence[Tensor | None], call: RowMomentsCall, backend: Backend, for_a: bool, for_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """See ``Backend.gradient``."""
    a, b, s = _operands(call)
    of = {name: f if f is None else f.reshape(call.rows).to(call.dtype) for name, f in zip(MOMENTS, upstream)}
    slope, d_a, d_b = error_derivative(s, None, "l1"), None, None
    if for_a:
        d_a = _summed(a, (of["a"], 1), (of["aa"], 2 * a), (of["ab"], b), (of["ss"], 2 * s), (of["l1"], slope))
        d_a = d_a.to(call.a.dtype)
    if for_b:
        ours = (of["b"], 1), (of["bb"], 2 * b), (of["b1"], error_derivative(b, None, "l1"))
        d_b = _summed(b, *ours, (of["ab"], a), (of["ss"], -2 * s), (of["l1"], -slope)).to(call.b.dtype)
    return d_a, d_b


def _operands(call: RowMomentsCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """a, b and a - b in the compute dtype."""
    a = call.a.to(call.dtype)
    if call.b is None:
        return a, None, a
    b = call.b.to(call.dtype)
    return a, b, a - b


def _size(values: Tensor) -> Tensor:
    return Error.apply(values, None, "l1")  # abs, with a slope of NaN at NaN


def _summed(like: Tensor, *terms: tuple[Tensor | None, Tensor | float | None]) -> Tensor:
    """The sum of factor * values; a term without a factor is left out."""
    total = torch.zeros_like(like)
    for factor, values in terms:
        if factor is not None:
            total = total + factor * values
    return total
