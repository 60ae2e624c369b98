"""Coefficients by PyTorch: rows of a table. Formulas are evaluated as they are, by ``fastdiff.coefficients``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...program import Program


def evaluate(program: Program, t: Tensor, dtype: torch.dtype) -> Sequence[Any] | None:
    """What ``program`` computes at times that were checked, each of the shape of ``t``, rounded once to ``dtype``; a
    row that there is not is NaN. None: evaluate the formulas."""
    return program.gathered(t, dtype) if program.index else None


def times(
    program: Program, seed: int | Tensor, samples: int, stream: int, sample_offset: int, device: Any, discrete: bool
) -> Tensor | None:
    """One time a sample, which ``program`` makes of a uniform: int64 if ``discrete``, else float64. None: evaluate the
    formula."""
    return None
