"""The launches of ``fastdiff.ops.prepared`` on the CPU: of what is plain, contiguous and of one shape, without a tensor
made on the way. Anything else gives None, and is the slower path's.

Where PyTorch lets its tensors be read from C (``torch_access``), one call of ``fastdiff._C`` does all of it:
``row_runner``, ``noise_runner``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...codes import DATA, DTYPES
from ...modes import wrapping
from ...torch_access import _C, never, reads_tensors
from .launch import layout_of, memory

_CODES = {dtype: DTYPES[dtype] for dtype in DATA}
_threads, _grad, _empty_like = torch.get_num_threads, torch.is_grad_enabled, torch.empty_like


def allow(native: bool) -> None:
    """Whether the runners below may run: where CPU tensors are this backend's. Else they give None."""
    if _C is not None:
        _C.allow_prepared(native)


def row_runner(table: Tensor) -> Callable:
    """The quick way of ``fastdiff.ops.prepared.PreparedSteps.run``, of float64 [rows, columns] on the CPU."""
    return partial(_C.prepared_row, _held(table)) if reads_tensors and len(table) else never


def noise_runner(table: Tensor) -> Callable:
    """That of ``fastdiff.ops.prepared.PreparedNoise.run``."""
    return partial(_C.prepared_noise, _held(table)) if reads_tensors and len(table) else never


def _held(table: Tensor) -> Any:
    return _C.prepared_table(*table.shape, memory(table))


def _memory(tensor: Any, shape: torch.Size, elements: int) -> tuple[int, int, int] | None:
    """The memory of a tensor that is as it must be; None for another."""
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.shape != shape or not tensor.is_contiguous():
        return None
    code = _CODES.get(tensor.dtype)
    if code is None or (tensor.requires_grad and _grad()):
        return None
    return tensor.data_ptr(), code, elements


def _rows(prepared: Any, dtype: torch.dtype) -> list[tuple[int, int, int]]:
    found = prepared.held.get(dtype)
    if found is None:
        table = prepared.placed(torch.device("cpu"), dtype)
        size, width = table.element_size(), table.shape[1]
        found = [(table.data_ptr() + k * width * size, DTYPES[dtype], width) for k in range(len(table))]
        prepared.held[dtype] = found
    return found


def run_row(prepared, k, x, m, clip, history, noise, log_variance, dtype, wanted):
    """One row of ``fastdiff.ops.prepared.PreparedSteps``, or None."""
    if wrapping() is not None:
        return None
    shape, elements = x.shape, x.numel()
    at_x, at_m = _memory(x, shape, elements), _memory(m, shape, elements)
    if at_x is None or at_m is None or dtype not in _CODES or (clip is not None and not clip > 0):
        return None
    at_n = at_v = None
    if noise is not None:
        at_n = _memory(noise, shape, elements)
        if at_n is None:
            return None
    if log_variance is not None:
        at_v = _memory(log_variance, shape, elements)
        if at_v is None:
            return None
    entries = ()
    if history:
        entries = tuple([_memory(entry, shape, elements) for entry in history])
        if None in entries or len(entries) > 4:
            return None
    wide = x.dtype is torch.float64 or m.dtype is torch.float64
    compute = torch.float64 if wide else torch.float32
    layout = layout_of(shape, (1,) * len(shape))[0]
    y = _empty_like(x) if dtype is x.dtype else x.new_empty(shape, dtype=dtype)
    x0 = entry = at_x0 = at_entry = None
    if wanted[0]:
        x0 = _empty_like(y)
        at_x0 = (x0.data_ptr(), _CODES[dtype], elements)
    if wanted[1]:
        entry = _empty_like(x) if x.dtype is compute else x.new_empty(shape, dtype=compute)
        at_entry = (entry.data_ptr(), _CODES[compute], elements)
    _C.step(
        layout, at_x, at_m, None, None, _rows(prepared, compute)[k], clip, entries, at_n, at_v,
        (y.data_ptr(), _CODES[dtype], elements), at_x0, at_entry, None, None, None, None, None, _threads(),
    )  # fmt: skip
    return y, x0, entry


def run_noise(prepared, index, x0, n):
    """``fastdiff.ops.prepared.PreparedNoise``, or None."""
    if wrapping() is not None:
        return None
    shape, elements = x0.shape, x0.numel()
    at_x0, at_n = _memory(x0, shape, elements), _memory(n, shape, elements)
    if at_x0 is None or at_n is None:
        return None
    wide = x0.dtype is torch.float64 or n.dtype is torch.float64
    compute = torch.float64 if wide else torch.float32
    code, size = DTYPES[compute], 8 if wide else 4
    if type(index) is int:
        start, _, _ = _rows(prepared, compute)[index]
        layout = layout_of(shape, (1,) * len(shape))[0]
        alpha, sigma = (start, code, 1), (start + size, code, 1)
    else:
        if type(index) is not Tensor or index.dtype is not torch.int64 or not index.is_cpu or len(index.shape) != 1:
            return None
        count = len(index)
        if count not in (1, shape[0] if shape else 1):
            return None
        table = prepared.placed(torch.device("cpu"), compute)
        index, rows = index.contiguous(), table.new_empty((2, count))
        gathered = rows.data_ptr(), code, 2 * count
        at_table, at_index = (table.data_ptr(), code, table.numel()), (index.data_ptr(), DTYPES[torch.int64], count)
        if _C.gather(at_table, len(table), 2, at_index, gathered) >= 0:
            return None  # one is out of range
        layout = layout_of(shape, (count, *(1,) * (len(shape) - 1)))[0]
        alpha, sigma = (gathered[0], code, count), (gathered[0] + size * count, code, count)
    x_t = _empty_like(x0)
    _C.noise(layout, at_x0, alpha, sigma, at_n, 0.0, None, (x_t.data_ptr(), at_x0[1], elements), None, _threads())
    return x_t
