"""The KL divergence from the standard normal distribution on a GPU, and its gradient: one launch each."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...calls import KLNormalCall
from ..interface import COEFFICIENTS, Backend, differentiable
from ..recording import recorded
from . import launch
from .arguments import unsuited
from .coefficients import arrange
from .functions import exp_excess, exponential
from .laid import own_rows
from .launch import Kernel
from .loss import float32
from .plan import plan, tile_of
from .reduction import reduce_terms
from .tiles import coefficient, halves_of, load, place_of, row_of, store
from .workspace import loss_workspace


@Kernel
def kl_normal(
    moments, gradient, weight, upstream, result, counters, partials,
    least, most, size, size_low, mean, both, rows, parts, number,
    units, runs, blocks, per, frames, shared, sample_runs,
    WEIGHT_KIND: tl.constexpr, UPSTREAM: tl.constexpr,
    REDUCTION: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr, SAMPLES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """weight (mean^2 + exp(v) - 1 - v) / 2 of log-variances v: the sums if there is a ``result``, or the ``gradient``
    by the moments. See the kernel ``loss`` for the numbers."""
    run, block, start, place, inside = place_of(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    first, second = halves_of(start, run, units, sample_runs, UNIT, SAMPLES)
    row = row_of(run, per, frames, shared, ROWS)
    strong = coefficient(weight, row, row, row == row, 0, WEIGHT_KIND)
    middle = load(moments, first, place, inside, EVEN, UNIT, ASM, EMULATE)
    log_variance = load(moments, second, place, inside, EVEN, UNIT, ASM, EMULATE)
    clamped = tl.clamp(log_variance, least, most, tl.PropagateNan.ALL)
    near = tl.abs(clamped) < 1
    excess = exp_excess(tl.where(near, clamped, 0.0))
    growth = tl.where(near, clamped + excess, exponential(clamped, ASM, EMULATE) - 1.0)  # exp(v) - 1
    left_out = tl.broadcast_to(strong == 0, middle.shape)  # whatever it holds
    if gradient is not None:
        factor = coefficient(upstream, row, row, row == row, 0, UPSTREAM) * both * strong
        store(gradient, first, place, tl.where(left_out, 0.0, factor * middle), inside, EVEN, EMULATE)
        slope = tl.where((log_variance >= least) & (log_variance <= most), 0.5 * factor * growth, 0.0)
        store(gradient, second, place, tl.where(left_out, 0.0, slope), inside, EVEN, EMULATE)
    if result is not None:
        excess = tl.where(near, excess, growth - clamped)
        value = tl.where(left_out, 0.0, strong * (0.5 * tl.fma(middle, middle, excess)))
        if not EVEN:
            value = tl.where(inside, value, 0.0)
        reduce_terms(value, run, block, result, counters, partials, number, rows, parts, runs, blocks, per, frames,
                     shared, size, size_low, mean, REDUCTION, LANES, SPLIT, ROWS, R, EMULATE)  # fmt: skip


def declines(call: KLNormalCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    because = unsuited(call.moments.device, (call.moments,), (call.weight,))
    if because:
        return because
    if differentiable(call.weight):
        return COEFFICIENTS
    own = own_rows(tuple(call.shape), tuple(call.weight.shape))
    return "" if own else "rows that alternate too often for a layout"


def run(call: KLNormalCall, backend: Backend) -> Tensor:
    """See ``KLNormalCall``."""
    rows = call.weight.shape if call.reduction == "none" else ()
    result = torch.empty(rows, dtype=torch.float32, device=call.moments.device)
    _launch(call, result=result)
    return recorded(result, None, call, 2, _again, backend.otherwise) if differentiable(call.moments) else result


def gradient(upstream: Tensor, call: KLNormalCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    return _again(call, upstream, None)


def _again(call: KLNormalCall, upstream: Tensor, _: None) -> Tensor:
    made = torch.empty(call.moments.shape, dtype=call.moments.dtype, device=call.moments.device)
    _launch(call, upstream=upstream.to(torch.float32), gradient=made)
    return made


def _launch(call: KLNormalCall, *, upstream: Any = None, result: Any = None, gradient: Any = None) -> None:
    """Launch the kernel for the sums or for the gradient."""
    moments = call.moments.contiguous()
    shape, device, rows_shape = tuple(call.shape), moments.device, tuple(call.weight.shape)
    rows = arrange(shape, call.weight, upstream, rows=rows_shape)
    elements = moments.numel() // 2
    how = plan(shape, rows_shape, tile_of(elements, moments.element_size()), True, sums=True)
    *constants, wide = how.constants
    number = how.rows if how.parts > 1 else how.grid[0]
    counters = partials = None
    if result is not None:
        counters, partials = loss_workspace(device, how.rows, how.parts, number)
    size = 1.0 if call.reduction == "sum" else elements / how.rows
    mean = 1.0 / how.rows if call.reduction == "mean" else 1.0
    kl_normal(
        device,
        how.grid,
        (
            *(moments, gradient, *rows.pointers, result, counters, partials, call.least, call.most),
            *(high := float32(size), size - high, mean, mean / size, how.rows, how.parts, number),
            *(*how.numbers, how.sample_runs),
        ),
        (
            *(*rows.kinds, call.reduction, 8 if launch.INTERPRETED else 128, how.parts > 1),
            *(*constants, wide or moments.numel() + 4096 >= 2**31),
            *(launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )
