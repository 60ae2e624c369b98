"""The moments operation: what adaptive weights, guidance and logs need of each row, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..calls import RowMomentsCall
from . import dispatch
from .checks import check_alike, check_floating, compute_dtype, placed_shape


class RowMoments(NamedTuple):
    """Sums over the elements of each row; a sum divided by ``count`` is a mean. What needs the absent b is None.

    Each is shaped [batch], or ``row_shape``."""

    aa: Tensor  # a^2
    ab: Tensor | None  # a b
    bb: Tensor | None  # b^2
    ss: Tensor | None  # (a - b)^2; aa - 2 ab + bb would cancel where a and b are alike
    l1: Tensor  # abs(a - b); abs(a) without b
    b1: Tensor | None  # abs(b)
    a: Tensor  # a
    b: Tensor | None  # b
    count: int  # the elements of a row


def row_moments(
    a: Tensor,  # [B, ...]
    b: Tensor | None = None,  # [B, ...]
    *,
    row_shape: Sequence[int] | None = None,
) -> RowMoments:
    """The sums of a^2, a b, b^2, (a - b)^2, abs(a - b), abs(b), a and b over each row, in one pass over a and b.

    These are sums, not means: divide by ``count``, the number of elements of a row. Without b there are the sums of
    a^2, abs(a) and a (``aa``, ``l1`` and ``a``); the others are None.

    Args:
        a, b: any floating-point dtypes and strides, of one shape [batch, ...].
        row_shape: what a row is, and the shape of the results, as ``ops.loss`` takes it: leading dimensions of a, or as
            many dimensions as a has, 1 where elements share a row ([B, 1, F, 1, 1]); () for one row of all. Default:
            [batch].

    Returns ``RowMoments``, float32 (float64 if a or b is float64). Elements are computed in that dtype, and summed in
    float64 on a CPU, in pairs of float32 on a GPU, in a fixed order. Differentiable in a and b, in one pass too; a
    moment that gets no gradient adds nothing to it. The slope of abs(0) is 0. NaN and infinity reach the sums of their
    row. The sums over no elements are 0.

    Raises TypeError or ValueError for unfit inputs.
    """
    check_floating(a=a)
    if b is not None:
        check_floating(b=b)
        check_alike(b=b, a=a)
    if not a.ndim:
        raise ValueError("a must have a batch dimension; got a scalar.")
    row_shape = tuple(a.shape[:1]) if row_shape is None else tuple(row_shape)
    rows = placed_shape("row_shape", row_shape, a.shape)
    sums = dispatch.run(RowMomentsCall(a, b, rows, row_shape, compute_dtype(a, b)), a.device)
    return RowMoments(*sums, math.prod([size for size, kept in zip(a.shape, rows) if kept == 1]))
