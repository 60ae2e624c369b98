"""The loss, and its gradient without autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import modes
from ...calls import LossCall, Packed
from ...tensors import decoded, number
from ..interface import Backend
from .coefficients import rows
from .error_functions import Error, error_derivative


def declines(call: LossCall) -> str:
    return ""


def run(call: LossCall, backend: Backend) -> Tensor:
    """See ``LossCall``."""
    function, n = call.function, _noise_of(call, backend)
    weight, mask = rows(call.weight, call.mask)
    call = call._replace(weight=weight, mask=mask)
    scale, c, spread = _spread(call, call.scale, call.c, weight)
    e = _scaled_error(call, n, scale, weight.dtype, _kept(spread, mask))
    error = Error.apply(e, c, function)
    if mask is not None:
        error = mask.to(weight.dtype) * error
    if call.reduction == "elements":
        return _spread(call, weight)[0] * error
    sums = weight * _sums(call, error)
    if call.reduction == "sum":
        return sums.sum().to(weight.dtype)
    divisor, count = _divisor(call)
    means = sums / divisor
    return (means.sum() / count if call.reduction == "mean" else means).to(weight.dtype)


def gradient(upstream: Tensor, call: LossCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    prediction, n = call.prediction, _noise_of(call, backend)
    weight, mask = rows(call.weight, call.mask)
    call = call._replace(weight=weight, mask=mask)
    dtype = weight.dtype
    scale, c, spread = _spread(call, call.scale, call.c, weight)
    if call.reduction == "elements":
        factor = (upstream * spread).to(dtype)
    else:
        factor = upstream * sum_rows(weight, weight.shape)
        if call.reduction != "sum":
            divisor, count = _divisor(call)
            factor = factor / divisor
            factor = factor / count if call.reduction == "mean" and weight.numel() else factor
        (factor,) = _spread(call, factor.to(dtype))
    kept = _kept(spread, mask)
    e = _scaled_error(call, n, scale, dtype, kept)
    slope = factor * error_derivative(e, c, call.function)
    for further in (None if mask is None else mask.to(dtype), scale):
        slope = slope if further is None else further * slope
    return torch.where(kept, slope, 0.0).to(prediction.dtype)


def value_and_gradient(upstream: Tensor | float, call: LossCall, backend: Backend) -> tuple[Tensor, Tensor]:
    """See ``Backend.value_and_gradient``: with the bits of autograd, where there is one."""
    upstream = number(upstream, call.weight.dtype, call.prediction.device)
    if modes.wrapping() is not None or torch.is_inference_mode_enabled():
        return run(call, backend), gradient(upstream, call, backend)
    with modes.gradients():
        leaf = modes.plain(call.prediction.detach()).requires_grad_()
        value = run(call._replace(prediction=leaf), backend)
        return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


def _noise_of(call: LossCall, backend: Backend) -> Tensor | None:
    shape, device = call.prediction.shape, call.prediction.device
    return None if call.q is None else backend.materialize(call.n, shape, device, packed=call.packed)


def _spread(call: LossCall, *coefficients: Any) -> list[Any]:
    return rows(*coefficients, packed=call.packed, shape=call.prediction.shape)


def counts(weight: Tensor) -> Tensor:
    """True where a weight is not 0. One that is learned leaves no row out, because its gradient is the row's term."""
    return torch.ones_like(weight, dtype=torch.bool) if weight.requires_grad else weight != 0


def _kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """True where an element counts: its row's weight and its mask are not 0. It broadcasts to the data."""
    kept = counts(weight)
    return kept if mask is None else kept & (mask != 0)


def _scaled_error(call: LossCall, n: Tensor | None, scale: Tensor | None, dtype: torch.dtype, kept: Tensor) -> Tensor:
    pairs = zip(_spread(call, call.p, call.r, call.q), (call.x0, call.y, n))
    terms = [
        factor * decoded(operand).to(dtype) for factor, operand in pairs if factor is not None and operand is not None
    ]
    target = sum(terms[1:], terms[0]) if terms else 0.0
    # 0 before and after the scale: an infinite one makes NaN of it, forward and backward.
    e = torch.where(kept, call.prediction.to(dtype) - target, 0.0)
    return e if scale is None else torch.where(kept, scale * e, 0.0)


def _divisor(call: LossCall) -> tuple[Tensor | float, Tensor | int]:
    """(the divisor of the sum of each row, the number of rows that a mean is over)"""
    weight, mask, normalization, packed = call.weight, call.mask, call.mask_normalization, call.packed
    shape = call.prediction.shape
    if normalization == "none" or (mask is None and (packed is None or normalization == "global")):
        if packed is not None and normalization == call.reduction == "none":
            sizes = _sizes(packed, weight)  # a row of weight 0 is 0, also where it has no elements
            return torch.where((sizes == 0) & (weight == 0), 1.0, sizes), weight.numel()
        return math.prod(shape) / max(1, weight.numel()), weight.numel()
    counts = _sizes(packed, weight) if mask is None else _sums(call, mask.expand(shape).to(weight.dtype))
    if normalization == "row":
        # A row with nothing in its mask has no mean, and is left out of that of the rows.
        return torch.where(counts == 0, 1.0, counts), (counts != 0).sum().clamp(min=1)
    total = counts.sum()
    return torch.where(total == 0, 1.0, total / max(1, counts.numel())), weight.numel()


def rows_of_mean(call: LossCall) -> Tensor | int:
    """The number of rows that the mean of a loss is over: all, or with "row" those whose mask is not empty."""
    return _divisor(call)[1] if call.mask_normalization == "row" else call.weight.numel()


def _sizes(packed: Packed, weight: Tensor) -> Tensor:
    return packed.sizes.to(weight.device, _wide(weight), non_blocking=True).view(weight.shape)


def _sums(call: LossCall, values: Tensor) -> Tensor:
    """The sum of each row of full-size ``values``, shaped as the weight."""
    shape = call.weight.shape
    if call.packed is None:
        return sum_rows(values, shape)
    return call.packed.sums(values.to(_wide(values))).view(shape)


def sum_rows(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum ``values`` over the dimensions in which ``shape`` is 1: float64 of that shape, in a fixed order."""
    dims = [d for d, size in enumerate(shape) if size == 1]
    return values.sum(dims, keepdim=True, dtype=_wide(values)) if dims else values.to(_wide(values))


def _wide(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64
