"""``fastdiff._C``, shown what it needs of PyTorch: its generators, and how its tensors are read from C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .codes import DATA, DTYPES
from .extension import load
from .modes import wrapping
from .recycling import LEAST, empty_like

_C, unavailable_because = load()


def _enable() -> bool:
    """Show ``fastdiff._C`` what it needs; whether it can read tensors itself, which takes PyTorch 2.10."""
    if _C is None:
        return False
    _C.enable_step_tables(torch.Generator, torch.default_generator, torch.get_num_threads)
    functions = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if functions is None:
        return False
    try:
        show_tensors(functions)
    except ValueError:  # of another version
        return False
    return True


def show_tensors(functions: Any) -> None:
    """Have ``fastdiff._C`` read tensors by this table of DLPack's functions."""
    dtypes = tuple(sorted(DATA, key=DTYPES.__getitem__))
    classes, large = (Tensor, torch.nn.Parameter), (empty_like, LEAST)
    _C.enable_tensors(functions, classes, dtypes, torch.empty_like, large, torch.is_grad_enabled, wrapping)


def never(*_: Any) -> None:
    """A fast call that always declines."""


reads_tensors = _enable()
# (tensor, dimensions) -> the number in a CPU tensor that has one; None for another.
number: Callable = _C.number if reads_tensors else never
