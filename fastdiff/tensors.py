"""Coefficients, one a row: how they are taken from a table by the times t."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .modes import fake_mode, has_values, lasting


class Gathered(NamedTuple):
    """A coefficient a row that is still to be gathered: column[index]; NaN where index is out of range."""

    column: Tensor  # [steps], any stride
    index: Tensor  # int64, rows as placed

    @property
    def dtype(self) -> torch.dtype:
        return self.column.dtype


def value_checks_are_free(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be looked at without waiting for a device or breaking a traced graph."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and has_values(tensor)


def cached(store: dict, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """``store[key]``, made if it is not there: a plain tensor, whatever mode or transform of PyTorch is on at the first
    use. Nothing is stored while a program is traced: it would be no tensor."""
    found = store.get(key)
    if found is None:
        if torch.compiler.is_compiling():
            return make()
        with lasting():
            found = make()
            store[key] = found = found.clone() if found.is_inference() else found
    mode = None if torch.compiler.is_compiling() else fake_mode()
    return found if mode is None else mode.from_tensor(found)


def gather_rows(table: Tensor, t: Tensor) -> Tensor:
    """Rows ``table[t]`` of a [steps, K] table: shape [*t.shape, K]. An index out of range gives a row of NaN."""
    index = t.long()
    if value_checks_are_free(t):  # the process's check has raised already
        return table[index]
    rows = table[index.clamp(0, len(table) - 1)]
    return torch.where(((index >= 0) & (index < len(table))).unsqueeze(-1), rows, math.nan)


def as_tensor(row: Tensor | Gathered) -> Tensor:
    """A coefficient a row as a tensor, shaped as placed."""
    if not isinstance(row, Gathered):
        return row
    column, index = row
    inside = (index >= 0) & (index < column.shape[0])
    return torch.where(inside, column[torch.where(inside, index, 0)], math.nan)


def in_two_passes(
    noise: Callable, x0: Tensor, n: Any, alpha: Any, sigma: Any, perturbation: float, xi: Any, keep_noise: bool,
    p: Any, q: Any,
) -> tuple[Tensor, Any, Tensor]:  # fmt: skip
    """(x_t, n, target = p x0 + q n) by a backend's ``noise`` called twice; a row that is None counts as 0."""
    x_t, n = noise(x0, n, alpha, sigma, perturbation, xi, keep_noise)
    zero = torch.zeros((1,) * x0.ndim, dtype=alpha.dtype, device=x0.device)
    return x_t, n, noise(x0, n, zero if p is None else p, zero if q is None else q, 0.0, None, False)[0]


def gather(table: Tensor, t: Tensor, check: Callable[[Tensor], None]) -> Sequence[Tensor]:
    """The columns of ``table`` [steps, K] at ``t``, each of the shape of ``t``. ``check`` raises for a wrong ``t``;
    where its values cannot be looked at, one out of range gives NaN."""
    check(t)
    return gather_rows(table, t).unbind(-1)
