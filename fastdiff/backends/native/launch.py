"""Tensors to the pointers and sizes that ``fastdiff._C`` takes. No autograd, and no checks: ``fastdiff.ops`` made them.

Rows come placed: as many dimensions as the data, 1 where shared. Tensors are contiguous; a mask may be anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import codes
from ...codes import DTYPES
from ..layout import layout_of

FUNCTIONS, REDUCTIONS, NORMALIZATIONS = (
    {name: k for k, name in enumerate(names)} for names in (codes.FUNCTIONS, codes.REDUCTIONS, codes.NORMALIZATIONS)
)


def arrange(shape: torch.Size, *rows: Tensor | None) -> tuple[tuple[int, ...], Sequence[Tensor | None]]:
    """The layout for rows that may be shared differently, and the rows: a single number, or contiguous in one shape."""
    common = None
    for row in rows:
        if row is not None and row.numel() != 1:
            if common is None:
                common = row.shape
            elif row.shape != common:
                common = torch.broadcast_shapes(*{row.shape for row in rows if row is not None})
                break
    layout, expanded = layout_of(shape, (1,) * len(shape) if common is None else common)
    for row in rows:
        if row is not None and row.numel() != 1 and not (row.shape == expanded and row.is_contiguous()):
            one_shape = [r if r is None or r.numel() == 1 else r.expand(expanded).contiguous() for r in rows]
            return layout, one_shape
    return layout, rows


def fits(shape: torch.Size, weight: Tensor, *rows: Tensor | None) -> bool:
    """Whether a layout has just the rows of ``weight``, so that there is one sum for each."""
    own = weight.shape
    for row in rows:
        if row is not None and row.shape != own and row.numel() != 1:
            return False
    return layout_of(shape, own)[1] == own


def memory(tensor: Tensor | None) -> tuple[int, int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype], tensor.numel())


def source(n: Any) -> tuple | None:
    """A noise tensor, or the ``fastdiff.ops.Philox`` to make it from."""
    if n is None or isinstance(n, Tensor):
        return memory(n)
    return int(n.seed), n.stream, n.sample_offset, n.offset


def masked(mask: Tensor | None, shape: torch.Size) -> tuple | None:
    if mask is None:
        return None
    elements = 1 + sum((size - 1) * stride for size, stride in zip(mask.shape, mask.stride())) if mask.numel() else 0
    # What the mask's storage holds from its first element on may be more; only what is reached counts.
    return mask.data_ptr(), DTYPES[mask.dtype], elements, tuple(shape), tuple(mask.expand(shape).stride())
