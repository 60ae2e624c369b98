"""The loss on the CPU, and its gradient.

The gradient is written in the same pass as the loss, for an upstream gradient of 1. If another upstream gradient comes
(accumulation, loss scaling, a second backward), the gradient is computed again with it, so no rounded gradient is ever
scaled. For float16, whose losses are scaled, it is always computed in the backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import modes, recycling
from ...calls import LossCall, made_from
from ...tensors import number
from ...torch_access import _C
from ..interface import COEFFICIENTS, Backend, differentiable, weight_of_elements
from ..layout import memory_order, of_rows
from ..reference import rows_of_mean
from ..saving import save, saved
from .launch import (
    FUNCTIONS,
    MOST_DIMS,
    NORMALIZATIONS,
    REDUCTIONS,
    arrange,
    contiguous,
    empty,
    fits,
    masked,
    memory,
    source,
    unsuited,
)


def declines(call: LossCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    prediction, x0, n, p, q, scale, weight, c, mask, y, r = call[:11]
    because = unsuited(prediction, x0, n, p, q, scale, weight, c, mask, *made_from(n), y, r)
    if because:
        return because
    if differentiable(x0, n, p, q, scale, c, mask, y, r, *weight_of_elements(call)):
        return COEFFICIENTS
    if call.packed is None and not fits(prediction.shape, weight, p, q, scale, c, r):
        return "rows that alternate too often for a layout"
    return ""


class Made(NamedTuple):
    """The results of one pass: the loss (of elements: their errors); and, if they were asked for, the mean of each row
    and the gradient by the prediction."""

    value: Tensor | None
    means: Tensor | None
    gradient: Tensor | None


def run(call: LossCall, backend: Backend) -> Tensor:
    """See ``LossCall``."""
    prediction, weight = call.prediction, call.weight
    if not differentiable(prediction, weight):
        return launch(call).value
    made = launch(call, means=differentiable(weight), gradient=ahead(prediction) and call.reduction in ("mean", "sum"))
    how = call[11:]
    return recorded(prediction, weight, made, call[:11], lambda *tensors: LossCall(*tensors, *how), backend.otherwise)


def ahead(prediction: Tensor) -> bool:
    """Whether the gradient is written along with the loss, for an upstream gradient of 1. Not for float16: its loss is
    scaled, so another upstream gradient will come."""
    return differentiable(prediction) and prediction.dtype is not torch.float16


class _Loss(torch.autograd.Function):
    """Attaches a gradient to a loss that has been computed already.

    ``made`` is a ``Made``. ``kept`` are the tensors that the loss was computed from; ``call_of(*kept)`` makes its
    ``LossCall`` again, for any gradient but the one that was written along with the loss. ``otherwise`` is the fallback
    that computes second derivatives. ``again(upstream, *kept)``, if there is one, gives the gradient without a record,
    or None."""

    @staticmethod
    def forward(ctx, prediction, weight, made, kept, call_of, otherwise, again=None):
        save(ctx, *kept)
        value, ctx.means, ctx.gradient = made
        ctx.call_of, ctx.otherwise, ctx.again = call_of, otherwise, again
        return value

    @staticmethod
    def backward(ctx, upstream):
        for_prediction, for_weight = ctx.needs_input_grad[:2]
        graph = torch.is_grad_enabled()  # of the gradient
        one = upstream.numel() == 1 and not graph and not modes.is_many(upstream) and float(upstream) == 1.0
        gradient, ctx.gradient = (ctx.gradient, None) if one else (None, ctx.gradient)
        if gradient is not None and not for_weight:
            return gradient, *(None,) * 6
        kept = saved(ctx)
        if ctx.again is not None and not graph and not modes.is_many(upstream):
            gradient = ctx.again(upstream, *kept)
            if gradient is not None:
                return gradient, *(None,) * 6
        call = ctx.call_of(*kept)
        if call.reduction == "none":
            upstream = upstream.reshape(call.weight.shape)
        if graph:
            inputs = [t for t, needed in ((call.prediction, for_prediction), (call.weight, for_weight)) if needed]
            found = iter(torch.autograd.grad(ctx.otherwise.run(call), inputs, upstream, create_graph=True))
            return next(found) if for_prediction else None, next(found) if for_weight else None, *(None,) * 5
        if for_prediction and gradient is None:
            if modes.is_many(upstream):  # several gradients at once
                gradient = ctx.otherwise.gradient(upstream, call)
            else:
                gradient = launch(call, upstream=upstream, value=False, gradient=True).gradient
        d_weight = None
        if for_weight:
            count = rows_of_mean(call) if call.reduction == "mean" else 1
            d_weight = (upstream * ctx.means / count).to(call.weight.dtype)
        return gradient if for_prediction else None, d_weight, *(None,) * 5


# (prediction, weight, (value, means, gradient), kept, call_of, otherwise[, again]) -> the loss, recorded for autograd:
# see ``_Loss``. It is what Function.apply comes to where no transform is at work.
recorded = super(torch.autograd.Function, _Loss).apply


def gradient(upstream: Tensor, call: LossCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    return launch(call, upstream=upstream, value=False, gradient=True).gradient


def value_and_gradient(upstream: Tensor | float, call: LossCall, backend: Backend) -> tuple[Tensor, Tensor]:
    """See ``Backend.value_and_gradient``."""
    upstream = number(upstream, call.weight.dtype, call.weight.device)
    made = launch(call, upstream=upstream, gradient=True)
    return made.value, made.gradient


def launch(
    call: LossCall,
    *,
    upstream: Tensor | None = None,
    value: bool = True,
    means: bool = False,
    gradient: bool = False,
) -> Made:
    """One pass over the data, which computes those of the loss, the means of the rows and the gradient that are
    wanted."""
    prediction, x0, n, p, q, scale, weight, c, mask, y, r, function, normalization, reduction, packed = call
    dtype, shape = weight.dtype, prediction.shape
    elements, d_errors = reduction == "elements", None
    if upstream is not None:
        upstream = upstream.resolve_neg().to(dtype)
        if elements and (by_row := of_rows(upstream, weight.shape, packed)) is None:
            upstream, d_errors = None, upstream
        elif elements:
            upstream = by_row
    layout, (w, p_, q_, scale_, c_, r_, up) = arrange(shape, weight, p, q, scale, c, r, upstream, packed=packed)
    rows = weight.shape
    result = weight.new_empty(rows if reduction == "none" else ()) if value and not elements else None
    row_means = weight.new_empty(rows, dtype=torch.float64) if means else None
    # A prediction in another order is read, and its gradient written, where it lies.
    elsewhere = prediction.ndim <= MOST_DIMS and memory_order(prediction) is not None
    order = (tuple(shape), prediction.stride()) if elsewhere else None
    m, d, errors = prediction if elsewhere else contiguous(prediction), None, None
    if gradient:
        d = recycling.empty(shape, m.dtype, m.stride()) if elsewhere else empty(shape, m.dtype, m)
    if elements and value:
        errors = recycling.empty(shape, dtype, m.stride()) if elsewhere else empty(shape, dtype, m)
    if d_errors is not None and not elsewhere:
        d_errors = contiguous(d_errors)
    elif d_errors is not None and d_errors.stride() != m.stride():
        d_errors = recycling.empty(shape, dtype, m.stride()).copy_(d_errors)
    # What is pointed at must be held until the call returns.
    x0, n, y = contiguous(x0), contiguous(n), contiguous(y)
    if mask is not None and mask.dtype == torch.int64:
        mask = mask.double()
    _C.loss(
        layout,
        memory(m),
        memory(x0) if p_ is not None else None,
        source(n) if q_ is not None else None,
        memory(p_),
        memory(q_),
        memory(scale_),
        memory(w),
        memory(c_),
        masked(mask, shape),
        memory(y) if r_ is not None else None,
        memory(r_),
        FUNCTIONS.get(function, function),  # of a weighted sum its numbers
        NORMALIZATIONS[normalization],
        REDUCTIONS["sum" if elements else reduction],
        memory(up),
        memory(result),
        memory(row_means),
        memory(d),
        memory(errors),
        memory(d_errors),
        order,
        torch.get_num_threads(),
    )
    return Made(errors if elements else result, row_means, d)
