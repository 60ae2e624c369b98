"""An objective's loss of a noised batch: by a fast call where one can compute it; otherwise in the general way, by a
record, for which everything that is asked of a loss is checked and placed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import packed as sequences
from .backends.interface import differentiable
from .calls import LossCall, Packed
from .coefficients import Rows
from .distributed.reducing import compare_loss, share, summed, whole_loss
from .element_weights import carried, has_elements
from .modes import gradients, plain
from .noised import Noised, check_noised, tensor_of
from .ops.checks import (
    check_alike,
    check_floating,
    check_unambiguous,
    compute_dtype,
    in_dtype,
    place_given,
    shape_of_rows,
)
from .ops.loss import check_loss, normalized, normalized_with_gradient
from .philox import Philox
from .tensors import as_tensor, number


def of_noised(
    objective: Any, prediction: Tensor, noised: Noised, how: tuple[Tensor | None, str, Tensor | float | None, str],
    target: Tensor | None, y: Tensor | None, r: Tensor | float | None, upstream: Tensor | float | None = None,
) -> Any:  # fmt: skip
    """``Objective.loss``; how: (mask, reduction, weight, mask_normalization). With ``upstream``, a number or a tensor
    []: (the loss, its gradient by ``prediction`` times it), neither recorded by autograd. The gradient by tokens is
    shaped as the patches of x0."""
    if not isinstance(noised, Noised):
        check_noised(prediction, noised)  # which says what it is
    x0, n, t, rows = noised.x0, noised.noise_source, noised.t, noised.rows
    noised.check_unchanged()
    mask, reduction, weight, normalization = how
    if (part := noised.part) is not None:
        compare_loss(noised, prediction, *how)
    if (tokens := noised.tokens) is not None:
        x0, n, prediction, mask, weight, target, y = tokens.of_loss(x0, n, prediction, mask, weight, target, y)
        how = mask, reduction, weight, normalization
    packed = None if noised.packed is None else noised.packed_rows
    if noised.objective is not objective:
        process = noised.objective.process
        if not torch.compiler.is_compiling() and not objective.process.has_levels_of(process):
            raise ValueError(
                f"noised is of the process {process!r}, this objective of {objective.process!r}: noise it anew."
            )
        rows = objective._rows(t, x0, compute_dtype(x0, tensor_of(n), prediction), packed)
    elif isinstance(prediction, Tensor) and prediction.dtype == torch.float64 != rows.dtype:
        rows = objective._rows(t, x0, torch.float64, packed)  # those of noising were rounded to float32
    mean = mask is None and weight is None and reduction == "mean" and normalization == "none"
    own = part is None or (mean and share(part, x0.shape) == 1)
    if own and target is None and y is None and r is None:
        result = objective._fast_loss(prediction, x0, n, t, rows, how, packed, upstream)
        if result is not None and part is not None:
            return summed(result, part) if upstream is None else (summed(result[0], part), result[1])
        if result is not None:
            return result
    if rows.coefficients is not objective._coefficients:  # the process was changed
        rows = objective._rows(t, x0, rows.dtype, packed)
    more = {"target": target, "y": y, "r": r, "packed": noised.packed, "alone": part is None}
    if part is None or reduction == "elements":
        made = objective._loss(prediction, x0, n, rows, t.shape, *how, upstream=upstream, **more)
        return tokens.joined(made) if tokens is not None and reduction == "elements" else made

    def whole(prediction: Tensor, **more: Any) -> Tensor:
        loss = partial(objective._loss, prediction, x0, n, rows, t.shape, **more)
        return whole_loss(loss, part, tokens, prediction, t.shape, *how)

    if upstream is None:
        return whole(prediction, **more)
    # What a part's gradient is multiplied by is known after the sums of all parts, and autograd keeps it.
    sole = torch.is_grad_enabled()
    with gradients():
        leaf = plain(prediction).requires_grad_()
        value = whole(leaf, sole=sole, **more)
        return value.detach(), torch.autograd.grad(value, leaf, number(upstream, value.dtype, value.device))[0]


def loss(
    objective: Any, prediction: Tensor, x0: Tensor, noise: Tensor | Philox, rows: Rows, row_shape: torch.Size,
    mask: Tensor | None, reduction: str, weight: Tensor | float | None, mask_normalization: str,
    upstream: Tensor | float | None = None, sole: bool = False, **more: Any,
) -> Any:  # fmt: skip
    """The loss of ``record``, whose arguments these are; for reduction "none" in the shape of the times. With
    ``upstream``, (the loss, its gradient by the prediction). ``sole``: nothing else may require grad."""
    how = mask, reduction, weight, mask_normalization
    call = record(objective, prediction, x0, noise, rows, row_shape, *how, **more)
    if sole or upstream is not None:
        _check_sole(call, more.get("target") is not None)
    if upstream is not None:
        return normalized_with_gradient(upstream, call, more.get("packed"))
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


_CALLED = {"n": "the noise", "x0": "x0", "mask": "the mask", "y": "y", "r": "r", "weight": "the weight"}


def _check_sole(call: LossCall, target: bool) -> None:
    """Raise ValueError if something other than the prediction requires grad."""
    for name, value in zip(call._fields[1:11], call[1:11]):
        if differentiable(value):
            name = "the target" if target and name == "x0" else _CALLED.get(name, "a coefficient")
            raise ValueError(
                f"{name} requires grad, and would get none: loss_and_gradient gives the gradient by prediction alone. "
                "Use loss(...).backward(), or detach it."
            )
