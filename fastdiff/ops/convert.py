"""The conversion operation: between kinds of prediction, and to the x0 estimate."""

from __future__ import annotations

from torch import Tensor

from ..calls import ConvertCall
from . import dispatch
from .checks import check_alike, check_floating, compute_dtype, place_all


def convert(
    m: Tensor,  # [B, ...]
    x_t: Tensor,  # [B, ...]
    k_x: Tensor | float,  # [B], or another shape that place_rows takes
    k_m: Tensor | float,  # as k_x
) -> Tensor:
    """k_x x_t + k_m m, in the dtype of m, shaped as m. Differentiable in all four.

    ``k_x`` and ``k_m`` are rows (``fastdiff.ops.checks.place_rows``), from ``fastdiff.prediction.conversion``.
    Raises TypeError or ValueError for unfit inputs.
    """
    check_floating(x_t=x_t, prediction=m)
    check_alike(x_t=x_t, prediction=m)
    dtype = compute_dtype(m, x_t)
    k_x, k_m = place_all(m.shape, dtype, m.device, k_x=k_x, k_m=k_m)
    call = ConvertCall(m, x_t, k_x, k_m)
    return dispatch.run(call, m.device)
