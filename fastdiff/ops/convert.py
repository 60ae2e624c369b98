"""The conversion operation: between kinds of prediction, and to the x0 estimate."""

from __future__ import annotations

from torch import Tensor

from . import dispatch
from .checks import check_alike, check_floating, compute_dtype, place_all


def convert(m: Tensor, x_t: Tensor, k_x: Tensor | float, k_m: Tensor | float) -> Tensor:
    """k_x x_t + k_m m, in the dtype of m, shaped as m. Differentiable in all four.

    ``k_x`` and ``k_m`` are rows (``fastdiff.ops.checks.place_rows``), from ``fastdiff.prediction.conversion``.
    Raises TypeError or ValueError for unfit inputs.
    """
    check_floating(x_t=x_t, prediction=m)
    check_alike(x_t=x_t, prediction=m)
    dtype = compute_dtype(m, x_t)
    k_x, k_m = place_all(m.shape, dtype, m.device, k_x=k_x, k_m=k_m)
    return dispatch.get(m.device).convert(m, x_t, k_x, k_m, m.dtype)
