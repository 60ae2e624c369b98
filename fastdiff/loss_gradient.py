"""The loss and its gradient in one pass, for loops that call ``prediction.backward(gradient)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import loss_record
from .noised import Noised, check_noised
from .numeric import check_numbers
from .ops.checks import check_floating
from .ops.operators.declaring import strided


def loss_and_gradient(
    objective: Any, prediction: Tensor, noised: Noised, scale: Tensor | float,
    how: tuple[Tensor | None, str, Tensor | float | None, str], *third: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``Objective.loss_and_gradient``. how: (mask, reduction, weight, mask_normalization); third: (target, y, r)."""
    if not isinstance(noised, Noised):
        check_noised(prediction, noised)  # which says what it is
    check_floating(prediction=prediction)
    if how[1] not in ("mean", "sum"):
        raise ValueError(
            f"loss_and_gradient is of one number: reduction must be 'mean' or 'sum'; got {how[1]!r}. For the losses of "
            "rows use loss(..., reduction='none')."
        )
    scale = _checked(scale, prediction)
    loss, gradient = loss_record.of_noised(objective, prediction.detach(), noised, how, *third, scale)
    if noised.tokens is not None:
        gradient = noised.tokens.joined(gradient)
    return loss, gradient if gradient.stride() == prediction.stride() else strided(gradient, prediction)


def _checked(scale: Any, prediction: Tensor) -> Tensor | float:
    """Raise TypeError or ValueError for what is no scale. Returns a number, or a tensor [] without a graph."""
    if not isinstance(scale, Tensor):
        check_numbers(scale=scale)
        return scale if type(scale) is float or type(scale) is int else float(scale)
    if not scale.is_floating_point():
        raise TypeError(f"scale must be a number, or a floating-point tensor; got one of {scale.dtype}.")
    if scale.ndim:
        raise ValueError(
            f"scale must be one number, a tensor of shape (); got {tuple(scale.shape)}. Further weights of rows are "
            "weight=."
        )
    if scale.device != prediction.device:
        raise ValueError(
            f"scale is on {scale.device}, but prediction on {prediction.device}: move it with .to(device), or pass a "
            "number."
        )
    return scale.detach()
