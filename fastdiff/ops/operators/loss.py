"""The loss, and its gradient, as operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...backends import reference
from ...backends.interface import COEFFICIENTS, Backend, able, differentiable, weight_of_elements
from ...backends.registry import get
from ...calls import Combination, LossCall
from ...tensors import number
from .declaring import (
    PACKED,
    declare,
    keep_arguments,
    kept_arguments,
    noise_arguments,
    packed_of,
    parts,
    source,
    strided,
)
from .declaring import run as runs

_ARGUMENTS = (
    f"Tensor prediction, Tensor weight, Tensor? x0, {noise_arguments('n')}, Tensor? p, Tensor? q, Tensor? scale, "
    "Tensor? c, Tensor? mask, Tensor? y, Tensor? r, str function, float[] combined, str normalization, str reduction, "
    f"{PACKED}"
)


def _call(prediction: Tensor, weight: Tensor, x0: Tensor | None, *arguments: Any) -> LossCall:
    """A loss from the arguments of its operator."""
    n, (p, q, scale, c, mask, y, r, function, combined, *how, starts, dim) = source(arguments)
    if combined:
        function = Combination(*(None if math.isnan(number) else number for number in combined))
    return LossCall(prediction, x0, n, p, q, scale, weight, c, mask, y, r, function, *how, packed_of(starts, dim))


def _fake(prediction, weight, *arguments):
    if arguments[-3] == "elements":
        return torch.empty_like(prediction, dtype=weight.dtype)
    return weight.new_empty(weight.shape if arguments[-3] == "none" else ())


@declare("loss", f"({_ARGUMENTS}) -> Tensor", _fake)
def _loss(prediction, *arguments):
    result = runs(_call(prediction, *arguments), prediction)
    return strided(result, prediction) if arguments[-3] == "elements" else result


def _fake_gradient(upstream, prediction, *arguments):
    return torch.empty_like(prediction)


@declare("loss_gradient", f"(Tensor upstream, {_ARGUMENTS}) -> Tensor", _fake_gradient)
def _loss_gradient(upstream, prediction, *arguments):
    call = _call(prediction, *arguments)
    gradient = able(get(prediction.device), call).gradient(upstream, call)
    return strided(gradient, prediction)


def _fake_both(upstream, prediction, weight, *arguments):
    return _fake(prediction, weight, *arguments), torch.empty_like(prediction)


@declare("loss_and_gradient", f"(Tensor upstream, {_ARGUMENTS}) -> (Tensor, Tensor)", _fake_both)
def _loss_and_gradient(upstream, prediction, *arguments):
    call = _call(prediction, *arguments)
    value, gradient = able(get(prediction.device), call).value_and_gradient(upstream, call)
    return value, strided(gradient, prediction)


def _backward(ctx, upstream):
    arguments = kept_arguments(ctx)
    d_prediction = d_weight = None
    if ctx.needs_input_grad[0]:
        d_prediction = torch.ops.fastdiff.loss_gradient(upstream, *arguments)
    if ctx.needs_input_grad[1]:
        prediction, weight, *others = arguments
        call = _call(*arguments)
        means = torch.ops.fastdiff.loss(prediction, torch.ones_like(weight), *others[:-3], "none", *others[-2:])
        count = max(1, weight.numel())
        factor = {"mean": 1 / count, "sum": prediction.numel() / count, "none": 1.0}[call.reduction]
        if call.reduction == "mean" and (call.mask is not None or call.packed is not None):
            factor = 1 / reference.rows_of_mean(call)
        if call.packed is not None and call.reduction != "none" and call.mask_normalization == "none":
            sizes = call.packed.sizes.to(weight.device, torch.float64).view(weight.shape)
            means = torch.where(sizes == 0, 0.0, means)
            factor = sizes if call.reduction == "sum" else sizes / prediction.numel()
        d_weight = (upstream * means * factor).to(weight.dtype)
    return d_prediction, d_weight, *(None,) * (len(arguments) - 2)


torch.library.register_autograd("fastdiff::loss", _backward, setup_context=keep_arguments)


def declines(call: LossCall) -> str:
    operands = (call.x0, call.n, call.p, call.q, call.scale, call.c, call.mask, call.y, call.r)
    return COEFFICIENTS if differentiable(*operands, *weight_of_elements(call)) else ""


def run(call: LossCall, backend: Backend) -> Tensor:
    return torch.ops.fastdiff.loss(*_arguments_of(call))


def value_and_gradient(upstream: Tensor | float, call: LossCall, backend: Backend) -> tuple[Tensor, Tensor]:
    upstream = number(upstream, call.weight.dtype, call.prediction.device)
    return torch.ops.fastdiff.loss_and_gradient(upstream, *_arguments_of(call))


def _arguments_of(call: LossCall) -> tuple[Any, ...]:
    prediction, x0, n, p, q, scale, weight, c, mask, y, r, function, *how, packed = call
    combined = []
    if isinstance(function, Combination):
        function, combined = "combined", [math.nan if number is None else number for number in function]
    made = parts(n if q is not None else None, prediction.device)
    x0 = x0 if p is not None else None
    how = c, mask, y, r, function, combined, *how
    return prediction, weight, x0, *made, p, q, scale, *how, *(packed or (None, None))
