"""The KL divergence from the standard normal distribution on the CPU, and its gradient. It is written ahead as that of
a loss is: in the same pass, for an upstream gradient of 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import KLNormalCall
from ...torch_access import _C
from ..interface import COEFFICIENTS, Backend, differentiable
from ..recording import recorded
from .launch import REDUCTIONS, arrange, contiguous, empty, fits, memory, unsuited
from .loss import ahead


def declines(call: KLNormalCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    because = unsuited(call.moments, call.weight)
    if because:
        return because
    if differentiable(call.weight):
        return COEFFICIENTS
    return "" if fits(call.shape, call.weight) else "rows that alternate too often for a layout"


def run(call: KLNormalCall, backend: Backend) -> Tensor:
    """See ``KLNormalCall``."""
    moments = call.moments
    written = _empty(moments) if ahead(moments) and call.reduction != "none" else None
    result = call.weight.new_empty(call.weight.shape if call.reduction == "none" else ())
    _launch(call, result=result, gradient=written)
    return recorded(result, written, call, 2, _again, backend.otherwise) if differentiable(moments) else result


def gradient(upstream: Tensor, call: KLNormalCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    return _again(call, upstream, None)


def _again(call: KLNormalCall, upstream: Tensor, written: Tensor | None) -> Tensor:
    if written is not None and upstream.numel() == 1 and float(upstream) == 1.0:
        return written
    made = _empty(call.moments)
    _launch(call, upstream=upstream.to(call.weight.dtype), gradient=made)
    return made


def _empty(moments: Tensor) -> Tensor:
    return empty(moments.shape, moments.dtype, moments)


def _launch(
    call: KLNormalCall,
    *,
    upstream: Tensor | None = None,
    result: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """One pass over the data, which writes those of the result and the gradient that are there."""
    by_row = upstream if call.reduction == "none" else None
    layout, (weight, by_row) = arrange(call.shape, call.weight, by_row)
    moments = contiguous(call.moments)  # held until the call returns
    _C.kl_normal(
        layout,
        memory(moments),
        memory(weight),
        call.least,
        call.most,
        REDUCTIONS[call.reduction],
        memory(upstream if by_row is None else by_row),
        memory(result),
        memory(gradient),
        torch.get_num_threads(),
    )
