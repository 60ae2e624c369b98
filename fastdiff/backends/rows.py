"""Coefficients that are rows of a table."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Gathered(NamedTuple):
    """A coefficient a row that is still to be gathered: column[index]; NaN where index is out of range."""

    column: Tensor  # [steps], any stride
    index: Tensor  # int64, rows as placed
