"""The fast calls of step tables on the CPU (csrc/step_table.cpp): one call of ``fastdiff._C`` reads contiguous tensors
of one shape, draws the noise block by block in the pass of the step, so that it is never stored, and makes the results.
It returns None, before it has drawn anything, for any other tensors; then ``fastdiff.ops.step_table`` takes the general
way, with the same bits."""

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
        _C.allow_step_tables(native)


def row_runner(table: Tensor) -> Callable:
    """The quick way of ``fastdiff.ops.step_table.PreparedSteps.run``, of float64 [rows, columns] on the CPU."""
    return partial(_C.table_step, _held(table)) if reads_tensors and len(table) else never


def noise_runner(table: Tensor) -> Callable:
    """That of ``fastdiff.ops.step_table.PreparedNoise.run``."""
    return partial(_C.table_noise, _held(table)) if reads_tensors and len(table) else never


def _held(table: Tensor) -> Any:
    return _C.coefficient_table(*table.shape, memory(table))
