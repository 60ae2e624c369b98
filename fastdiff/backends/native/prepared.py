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
from ...torch_access import _C, never, reads_tensors
from .launch import memory

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
