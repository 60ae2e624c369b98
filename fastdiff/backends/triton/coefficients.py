"""Coefficients as a kernel reads them: one number, a row each, or a table's column and the rows' index into it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...tensors import Gathered, as_tensor
from ..layout import layout_of

Coefficient = Any  # a Tensor placed as rows, a Gathered, or None


class Rows(NamedTuple):
    """Coefficients as arguments of a kernel.

    Attributes:
        shape: the shape of the placed coefficients.
        pointers, kinds: the memory of each coefficient, and how it is read: "none", "one", "row" or "gathered".
        index, index_kind: the rows of a table that are gathered, and how they are read.
        steps, stride: the length and the stride of the table's columns.
    """

    shape: tuple[int, ...]
    pointers: tuple[Tensor | None, ...]
    kinds: tuple[str, ...]
    index: Tensor | None
    index_kind: str
    steps: int
    stride: int


def is_one(rows: Tensor) -> bool:
    """Whether ``rows`` is a single number in memory, however often it is repeated."""
    return rows.numel() == 1 or not any(stride for size, stride in zip(rows.shape, rows.stride()) if size != 1)


def shape_of(coefficient: Coefficient) -> tuple[int, ...]:
    """The shape of a placed coefficient; () for None."""
    if coefficient is None:
        return ()
    return tuple(coefficient.index.shape if isinstance(coefficient, Gathered) else coefficient.shape)


def arrange(shape: tuple[int, ...], *coefficients: Coefficient, rows: tuple[int, ...] | None = None) -> Rows:
    """Bring coefficients of different shapes into one layout: the layout of ``rows``, or one that fits all. A
    coefficient that has it already is not copied."""
    first: Gathered | None = None
    found: list[tuple[Tensor | Gathered | None, bool]] = []  # and whether it is one number
    many: set[tuple[int, ...]] = set()
    for c in coefficients:
        if isinstance(c, Gathered):
            if first is None:
                first = c
            elif not _alike(first, c):
                c = as_tensor(c)
        spread = c.index if isinstance(c, Gathered) else c
        one = spread is None or is_one(spread)
        if not one:
            many.add(tuple(spread.shape))
        found.append((c, one))
    if rows is not None:
        common = rows
    elif not many:
        common = (1,) * len(shape)
    else:
        common = next(iter(many)) if len(many) == 1 else tuple(torch.broadcast_shapes(*many))
        common = layout_of(shape, common)[1]

    def placed(t: Tensor, one: bool) -> tuple[Tensor, str]:
        return (t, "one") if one else (t.expand(common).contiguous(), "row")

    pointers: list[Tensor | None] = []
    kinds = []
    for c, one in found:
        pointer, kind = (
            (None, "none") if c is None else (c.column, "gathered") if isinstance(c, Gathered) else placed(c, one)
        )
        pointers.append(pointer)
        kinds.append(kind)
    index, index_kind, steps, stride = None, "none", 0, 0
    if first is not None:
        index, index_kind = placed(first.index, is_one(first.index))
        steps, stride = first.column.shape[0], first.column.stride(0)
    return Rows(common, tuple(pointers), tuple(kinds), index, index_kind, steps, stride)


def _alike(a: Gathered, b: Gathered) -> bool:
    """Whether both have the same index, and columns of the same stride."""
    same_index = a.index is b.index or (
        a.index.data_ptr() == b.index.data_ptr()
        and a.index.shape == b.index.shape
        and a.index.stride() == b.index.stride()
    )
    return same_index and a.column.shape == b.column.shape and a.column.stride() == b.column.stride()
