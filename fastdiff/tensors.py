"""Helpers for coefficients, one a row: a lookup in a table by the times t, and whether looking at values is free; the
decoding of images; and conditions that are nested."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .modes import fake_mode, has_values, lasting


class Gathered(NamedTuple):
    """A coefficient that is looked up by the kernel that uses it: column[index]; NaN where index is out of range."""

    column: Tensor  # [steps], any stride
    index: Tensor  # int64, rows as placed

    @property
    def dtype(self) -> torch.dtype:
        return self.column.dtype


def value_checks_are_free(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be looked at without waiting for a device or breaking a traced graph."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and has_values(tensor)


def cached(store: dict, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """``store[key]``, made by ``make`` if it is not there. It is a plain tensor, whatever mode or transform of PyTorch
    is on at the first use. Nothing is stored while a program is traced, when there are no real tensors."""
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


# 1 / 127.5 in two parts: a byte times the first is exact, so the sum of both products is rounded once, fused or not. It
# is the quotient, correctly rounded, of all 256 bytes, on every device; a division by a number is not: CUDA multiplies.
# csrc/cpu/storage.h and backends/triton/philox.py have the same numbers.
IMAGE_SCALE = (2.0**-7 + 2.0**-15, float.fromhex("0x1.010102p-23"))


def decoded(x0: Tensor) -> Tensor:
    """Images of uint8 as float32 in [-1, 1]: x0 / 127.5 - 1, with the bits of two rounded operations. Other data is
    returned as it is."""
    if x0.dtype != torch.uint8:
        return x0
    high, low = IMAGE_SCALE
    u = x0.float()
    return (u * high + u * low) - 1.0


def as_tensor(row: Tensor | Gathered) -> Tensor:
    """A coefficient a row as a tensor, shaped as placed."""
    if not isinstance(row, Gathered):
        return row
    column, index = row
    inside = (index >= 0) & (index < column.shape[0])
    return torch.where(inside, column[torch.where(inside, index, 0)], math.nan)


def number(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, or a tensor [] on ``device``, as a tensor [] of ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if torch.compiler.is_compiling():  # a factor stays an input of the graph, what fills a tensor would be a part of it
        return (torch.ones((), dtype=torch.float64, device=device) * value).to(dtype)
    return torch.full((), value, dtype=dtype, device=device)


def with_entries(nested: Any, entries: list[Any]) -> Any:
    """A dict, tuple or list of the type of ``nested``, an ``OrderedDict`` or a named tuple too, that holds ``entries``
    in place of its own, in their order."""
    if type(nested) is dict:
        return dict(zip(nested, entries))
    if isinstance(nested, dict):
        made = copy.copy(nested)
        for key, entry in zip(nested, entries):
            made[key] = entry
        return made
    return type(nested)(*entries) if hasattr(nested, "_fields") else type(nested)(entries)
