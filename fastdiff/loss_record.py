"""The record of an objective's loss, in the general way: everything that is asked of a loss is checked and placed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import packed as sequences
from .calls import LossCall, Packed
from .coefficients import Rows
from .element_weights import carried, has_elements
from .ops.checks import (
    check_alike,
    check_floating,
    check_unambiguous,
    compute_dtype,
    in_dtype,
    place_given,
    shape_of_rows,
)
from .ops.loss import check_loss, normalized
from .philox import Philox
from .tensors import as_tensor


def loss(
    objective: Any, prediction: Tensor, x0: Tensor, noise: Tensor | Philox, rows: Rows, row_shape: torch.Size,
    mask: Tensor | None, reduction: str, weight: Tensor | float | None, mask_normalization: str, **more: Any,
) -> Tensor:  # fmt: skip
    """The loss of ``record``, whose arguments these are; for reduction "none" in the shape of the times."""
    how = mask, reduction, weight, mask_normalization
    call = record(objective, prediction, x0, noise, rows, row_shape, *how, **more)
    result = normalized(call, more.get("packed"))
    if reduction != "none":
        return result
    if mask_normalization != "sample" or call.packed is not None:
        return result.reshape(row_shape)
    return result if call.mask_normalization == "sample" else result.flatten(1).mean(1)


def record(
    objective: Any,
    prediction: Tensor,
    x0: Tensor,
    noise: Tensor | Philox,
    rows: Rows,
    row_shape: torch.Size,
    mask: Tensor | None,
    reduction: str,
    weight: Tensor | float | None,
    mask_normalization: str,
    target: Tensor | None = None,
    y: Tensor | None = None,
    r: Tensor | float | None = None,
    packed: Packed | None = None,
    alone: bool = True,
) -> LossCall:
    """The record of a loss of ``objective``.

    Args:
        rows: the coefficients at the times, of shape ``row_shape``.
        mask, reduction, weight, mask_normalization, target, y, r: as ``Objective.loss`` takes them.
        packed: where the sequences of packed data lie.
        alone: see ``check_loss``.
    """
    uses_x0, uses_noise = objective.prediction.uses_x0, objective.prediction.uses_noise
    x0_, n = x0 if uses_x0 else None, noise if uses_noise else None
    p, q, scale, own_weight, c = objective._rows_of_loss(rows)
    if target is not None:
        check_floating(target=target)
        check_alike(target=target, prediction=prediction)
        x0_, n, p, q = target, None, 1.0, None
    if isinstance(mask, Tensor):
        check_unambiguous("mask", mask.shape, prediction.shape)
    of_rows = sequences.of_rows(packed, row_shape)
    mask = check_loss(prediction, x0_, n, mask, mask_normalization, reduction, y, alone, of_rows)
    like = sequences.placed_for(prediction, of_rows)
    if of_rows is not None and mask_normalization == "sample":
        mask_normalization = "row"
    # Noise that is made again counts as what it was made for.
    dtype = compute_dtype(prediction, x0_, n if isinstance(n, Tensor) or n is None else x0, y)
    rows_of = shape_of_rows(row_shape, prediction)
    if isinstance(weight, Tensor) and has_elements(weight, rows_of):
        how = weight, mask, mask_normalization, reduction, rows_of, prediction, dtype
        mask, factor = carried(*how) if packed is None else sequences.carried(packed, *how)
        own_weight, mask_normalization = as_tensor(own_weight) * factor, "none"
    elif weight is not None:
        own_weight = in_dtype(as_tensor(own_weight), dtype, prediction)
        own_weight = own_weight * place_given("weight", weight, row_shape, like)
    if r is not None and y is None:
        raise ValueError("r is the factor of y in the target: pass y, a tensor shaped as prediction, too.")
    if target is not None or y is not None:
        r = None if y is None else place_given("r", 1.0 if r is None else r, row_shape, like)
        p, r = (in_dtype(row, dtype, prediction) for row in (p, r))
    p, q, scale, own_weight, c = [
        row if row is None or row.dtype == dtype else in_dtype(row, dtype, prediction)
        for row in (p, q, scale, own_weight, c)
    ]
    how = objective.loss_function.function, mask_normalization, reduction, of_rows
    return LossCall(prediction, x0_, n, p, q, scale, own_weight, c, mask, y, r, *how)
