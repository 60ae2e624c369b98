"""Which tensors ``fastdiff._C`` takes, and the pointers and sizes that it is given. No autograd, and no checks, which
``fastdiff.ops`` has made.

Coefficients come placed: as many dimensions as the data, 1 where shared. Tensors are contiguous; a mask may have any
strides, x_t and the prediction of a loss may lie in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import recycling
from ...calls import Packed
from ...codes import DTYPES
from ...modes import wrapping
from ...torch_access import _C
from ..interface import TRANSFORMED
from ..layout import layout_of

FUNCTIONS, REDUCTIONS, NORMALIZATIONS = (
    {name: k for k, name in enumerate(_C.codes[what] if _C else ())}
    for what in ("functions", "reductions", "normalizations")
)

MOST_DIMS = 8  # of a tensor that does not lie in memory in its own order

empty_on_cpu = partial(torch.empty, device="cpu")  # for small results, in fewer calls than ``recycling.empty``
_is_compiling, _Parameter = torch.compiler.is_compiling, torch.nn.Parameter


def unsuited(*tensors: Any) -> str:
    """Why one of these tensors is not ordinary memory on the CPU; empty if all are. A value that is no tensor is passed
    over."""
    if _is_compiling() or wrapping() is not None:
        return TRANSFORMED
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is _Parameter:
            if not tensor.is_cpu:
                return f"a tensor on {tensor.device}"
            if tensor.dtype not in DTYPES:
                return f"a tensor of {tensor.dtype}"
            if tensor.is_neg():
                return "a tensor that PyTorch negates as it is read"
        elif isinstance(tensor, Tensor):
            return f"a {kind.__name__}, which is a subclass of Tensor"
    return ""


def makes(seed: int | Tensor, samples: int | Tensor, device: Any) -> str:
    """Why noise of this seed and of these samples cannot be made here for ``device``; empty if it can."""
    return unsuited(seed, samples) or (
        "" if device is None or torch.device(device).type == "cpu" else f"noise on {device}"
    )


def contiguous(tensor: Any) -> Any:
    return tensor.contiguous() if isinstance(tensor, Tensor) else tensor


def empty(shape: torch.Size, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A contiguous tensor to write to. ``like`` is on the CPU; if it has the same shape and dtype, that saves time."""
    if math.prod(shape) * dtype.itemsize >= recycling.LEAST:
        return recycling.empty(shape, dtype)
    if dtype == like.dtype and like.is_contiguous() and shape == like.shape:
        return torch.empty_like(like)
    return like.new_empty(shape, dtype=dtype)


def in_format_of(tensor: Tensor, result: Tensor | None) -> Tensor | None:
    """``result`` in the memory format of ``tensor``: a channels_last network gets a channels_last x_t."""
    if result is None or tensor.is_contiguous():
        return result
    return recycling.empty_like(tensor, dtype=result.dtype).copy_(result)


def arrange(
    shape: torch.Size, *rows: Tensor | None, packed: Packed | None = None
) -> tuple[tuple[int, ...], Sequence[Tensor | None]]:
    """The layout for rows that may be shared differently, and the rows: a single number, or contiguous in one shape."""
    if packed is not None:
        return memory(packed.starts), [contiguous(row) for row in rows]
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
    return int(n.seed), n.stream, samples(n.sample_offset), n.offset


def samples(sample_offset: int | Tensor) -> int | tuple:
    """The index of the first sample, or the ids of the samples."""
    return memory(sample_offset) if isinstance(sample_offset, Tensor) else sample_offset


def masked(mask: Tensor | None, shape: torch.Size) -> tuple | None:
    if mask is None:
        return None
    # What the mask's storage holds from its first element on may be more; only what is reached counts.
    elements = 1 if mask.numel() else 0
    if not mask.is_contiguous():
        for size, stride in zip(mask.shape, mask.stride()):
            elements += (size - 1) * stride if mask.numel() else 0
    elif elements:
        elements = mask.numel()
    return mask.data_ptr(), DTYPES[mask.dtype], elements, tuple(shape), tuple(mask.expand(shape).stride())
