"""Coefficients at the times of a batch: a table's columns, or rational functions of t."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...tensors import Gathered
from ..interface import differentiable
from . import arguments, launch
from .arguments import TYPES, untouched

_ROWS = 128  # a program


def gather(table: Tensor, t: Tensor, check: Callable[[Tensor], None]) -> Sequence[Gathered] | None:
    """The columns of ``table`` [steps, K] at ``t``, which the kernels gather; None where they do not run. ``check``
    raises for a wrong ``t``."""
    if not arguments.runs_on(t.device):
        return None
    check(t)
    index = t.long()
    return [Gathered(column, index) for column in table.unbind(1)]


def rational(fractions: Tensor, t: Tensor) -> Sequence[Tensor] | None:
    """Rows (a + b t) / (1 + d t) of times t, float32 in the shape of t, one for each column of ``fractions``
    [3, columns], float64; None where they are to be computed otherwise."""
    usable = (
        untouched() and type(t) in TYPES and t.dtype in (torch.float32, torch.float64) and arguments.runs_on(t.device)
    )
    if not usable or not t.numel() or not t.is_contiguous() or differentiable(t):
        return None
    columns, samples = fractions.shape[1], t.numel()
    rows = torch.empty((columns, *t.shape), dtype=torch.float32, device=t.device)
    launch.rational(t.device, (-(-samples // _ROWS), 1), (rows, t, fractions, samples), (columns, _ROWS))
    return rows.unbind(0)
