"""The terms of the variational bound on the CPU, and their gradient. It is written ahead as that of a loss is: in the
same pass, for an upstream gradient of 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import GaussianCall, made_from
from ...torch_access import _C
from ..interface import COEFFICIENTS, Backend, differentiable
from ..recording import recorded
from .launch import REDUCTIONS, arrange, contiguous, empty, fits, memory, source, unsuited
from .loss import ahead


def declines(call: GaussianCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    because = unsuited(*call[:12], *made_from(call.n))
    if because:
        return because
    if differentiable(*call[1:12]):
        return COEFFICIENTS
    own = fits(call.shape, call.weight, *call[3:10], call.simple_weight)
    return "" if own else "rows that alternate too often for a layout"


def run(call: GaussianCall, backend: Backend) -> Tensor:
    """See ``GaussianCall``."""
    output = call.output
    written = _empty(output) if ahead(output) and call.reduction != "none" else None
    result = call.weight.new_empty(call.weight.shape if call.reduction == "none" else ())
    _launch(call, result=result, gradient=written)
    return recorded(result, written, call, 12, _again, backend.otherwise) if differentiable(output) else result


def gradient(upstream: Tensor, call: GaussianCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    return _again(call, upstream, None)


def _again(call: GaussianCall, upstream: Tensor, written: Tensor | None) -> Tensor:
    if written is not None and upstream.numel() == 1 and float(upstream) == 1.0:
        return written
    made = _empty(call.output)
    _launch(call, upstream=upstream.to(call.weight.dtype), gradient=made)
    return made


def _empty(output: Tensor) -> Tensor:
    return empty(output.shape, output.dtype, output)


def _launch(
    call: GaussianCall,
    *,
    upstream: Tensor | None = None,
    result: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """One pass over the data, which writes those of the result and the gradient that are there."""
    by_row = upstream if call.reduction == "none" else None
    # The rows of the weight come with the others: ``fits`` has found that they are those of the layout.
    layout, (*coefficients, by_row) = arrange(call.shape, *call[3:12], by_row)
    # What is pointed at must be held until the call returns.
    output, x0, n = contiguous(call.output), contiguous(call.x0), contiguous(call.n)
    _C.gaussian_kl(
        layout,
        memory(output),
        memory(x0),
        source(n) if call.q is not None else None,
        *map(memory, coefficients),
        int(call.freeze_mean),
        REDUCTIONS[call.reduction],
        memory(upstream if by_row is None else by_row),
        memory(result),
        memory(gradient),
        torch.get_num_threads(),
    )
