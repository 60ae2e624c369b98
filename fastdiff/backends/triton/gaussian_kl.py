"""The terms of the variational bound on a GPU, and their gradient.

One launch, with the reduction of ``loss.py``. With a learned variance it reads both halves of the network's output in
place, and writes both halves of its gradient. The gradient is written ahead as that of a loss is, and on the same
conditions.

In float32, exp(z) - 1 - z is a polynomial for small z; and exp(z) for larger ones is exp(-L) exp(l_q), of which the
second is one number a row. What a bin takes is computed only by programs that have a row of bins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...calls import GaussianCall
from ..interface import COEFFICIENTS, Backend, differentiable
from ..recording import recorded
from . import launch
from .arguments import source_of, unsuited
from .coefficients import arrange, shape_of
from .functions import exp_excess, exponential, inverse, log_1_plus, logarithm
from .laid import own_rows
from .launch import Kernel
from .loss import ahead, float32
from .plan import plan, tile_of
from .reduction import reduce_terms
from .tiles import coefficient, entry_of, halves_of, load, made_noise, place_of, prefetch, row_of, store
from .workspace import Cell, cell, loss_workspace, of_this_stream

# Elements a tile where rows may be of bins, which take four times the registers.
BIN_TILE = 1024


@triton.jit
def _gaussian(d, log_variance, l_q, is_divergence, ASM: tl.constexpr, EMULATE: tl.constexpr):
    """(rho, its derivative by d, by the log-variance) of a divergence or of a density."""
    precision = exponential(-log_variance, ASM, EMULATE)
    by_d = d * precision
    z = l_q - log_variance
    near = tl.abs(z) < 1
    excess = exp_excess(tl.where(near, z, 0.0))
    # exp(z) - 1
    growth = tl.where(near, z + excess, tl.fma(precision, exponential(l_q, ASM, EMULATE), -1.0))
    excess = tl.where(near, excess, growth - z)
    constant = tl.where(is_divergence, excess, log_variance + 1.8378770664093453)  # ln(2 pi)
    growth = tl.where(is_divergence, growth, -1.0)
    return 0.5 * tl.fma(d, by_d, constant), by_d, -0.5 * tl.fma(d, by_d, growth)


@triton.jit
def _bin(d, log_variance, half_width, data, ASM: tl.constexpr, EMULATE: tl.constexpr):
    """(rho, its derivative by d, by the log-variance) of a bin: see ``reference/gaussian_terms.py``."""
    lower, upper = data < -0.999, data > 0.999
    edge = lower | upper
    inverse_deviation = exponential(-0.5 * log_variance, ASM, EMULATE)
    # Beyond the bounds all has settled, and cubes would overflow.
    plus = tl.clamp((half_width - d) * inverse_deviation, -1e4, 1e4, tl.PropagateNan.ALL)
    minus = tl.clamp((-half_width - d) * inverse_deviation, -1e4, 1e4, tl.PropagateNan.ALL)
    width = 2.0 * half_width * inverse_deviation
    squares = tl.fma(plus, plus + minus, minus * minus)
    above, below = 1.5957691216057308 * plus, 1.5957691216057308 * minus  # times 2 sqrt(2 / pi)
    a, b = above * tl.fma(0.044715 * plus, plus, 1.0), below * tl.fma(0.044715 * minus, minus, 1.0)
    scaled_width = 1.5957691216057308 * width
    apart = scaled_width * tl.fma(0.044715, squares, 1.0)  # a - b
    # ln sigmoid(a), ln sigmoid(-b), sigmoid(-a), sigmoid(b)
    of_a, of_b = exponential(-tl.abs(a), ASM, EMULATE), exponential(-tl.abs(b), ASM, EMULATE)
    log_a = tl.where(a > 0, 0.0, a) - log_1_plus(of_a, ASM)
    log_b = tl.where(b < 0, 0.0, -b) - log_1_plus(of_b, ASM)
    slope_a = tl.where(a > 0, of_a, 1.0) * inverse(1.0 + of_a, ASM)
    slope_b = tl.where(b < 0, of_b, 1.0) * inverse(1.0 + of_b, ASM)
    # 1 - exp(-apart), its logarithm, and 1 / (exp(apart) - 1)
    near = apart < 0.6931471805599453
    small = tl.where(near, apart, 0.5)
    falls = exponential(-apart, ASM, EMULATE)
    between = tl.where(near, small - exp_excess(-small), 1.0 - falls)
    ratio = falls * inverse(between, ASM)
    log_between = tl.where(near, logarithm(between, ASM), -log_1_plus(tl.where(near, 1.0, ratio), ASM))
    ratio = tl.where(edge, 0.0, ratio)
    value = tl.where(upper, 0.0, log_a) + tl.where(lower, 0.0, log_b) + tl.where(edge, 0.0, log_between)
    slope_a = tl.where(upper, 0.0, slope_a) * (1.5957691216057308 * tl.fma(0.134145 * plus, plus, 1.0))
    slope_b = tl.where(lower, 0.0, slope_b) * (1.5957691216057308 * tl.fma(0.134145 * minus, minus, 1.0))
    turn = (ratio * scaled_width) * (0.134145 * (plus + minus))
    stretch = (ratio * scaled_width) * tl.fma(0.134145, squares, 1.0)
    by_d = inverse_deviation * (slope_a - slope_b + turn)
    by_log_variance = 0.5 * (tl.fma(slope_a, plus, stretch) - slope_b * minus)
    improbable = value < -27.631021115928547  # ln 1e-12
    value = tl.where(improbable, -27.631021115928547, value)
    return -value, tl.where(improbable, 0.0, by_d), tl.where(improbable, 0.0, by_log_variance)


@Kernel
def gaussian_kl(
    prediction, x0, n, gradient, p, q, scale, l_0, l_v, l_q, half_width, weight, simple_weight, index, seed, ids,
    upstream, used, assumed, result, counters, partials,
    stream, sample_offset, strength, size, size_low, mean, both, rows, parts, number,
    steps, stride, units, runs, blocks, per, frames, shared, sample_runs, channel_runs,
    P_KIND: tl.constexpr, Q_KIND: tl.constexpr, SCALE_KIND: tl.constexpr, L_0_KIND: tl.constexpr,
    L_V_KIND: tl.constexpr, L_Q_KIND: tl.constexpr, HALF_WIDTH_KIND: tl.constexpr, WEIGHT_KIND: tl.constexpr,
    SIMPLE_WEIGHT_KIND: tl.constexpr, UPSTREAM: tl.constexpr, INDEX: tl.constexpr,
    N: tl.constexpr, SEED: tl.constexpr, OFFSET: tl.constexpr, FREEZE_MEAN: tl.constexpr,
    REDUCTION: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr, SAMPLES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """weight rho + simple_weight e^2. Writes the sums if there is a ``result``, and the gradient by the network's
    output if there is a ``gradient``. ``prediction`` is that output: with ``l_v`` its samples are twice as long, v
    being the second half of each. See the kernel ``loss`` for ``upstream``, ``used``, ``assumed`` and the numbers."""
    if UPSTREAM != "none" and used is not None:
        came = tl.load(upstream)
        if came == tl.load(used):
            return
        tl.store(assumed, came, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))

    run, block, start, place, inside = place_of(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    first, second = start, start
    if L_V_KIND != "none":
        first, second = halves_of(start, run, units, sample_runs, UNIT, SAMPLES)
    if N != "none" and N != "tensor":
        prefetch(prediction, first, block, units, R, C, UNIT, EVEN, ASM)
        if L_V_KIND != "none":
            prefetch(prediction, second, block, units, R, C, UNIT, EVEN, ASM)
        if P_KIND != "none":
            prefetch(x0, start, block, units, R, C, UNIT, EVEN, ASM)
    row = row_of(run, per, frames, shared, ROWS)
    entry, found = entry_of(index, row, steps, INDEX)
    e = load(prediction, first, place, inside, EVEN, UNIT, ASM, EMULATE)
    if N != "none":
        q_row = coefficient(q, row, entry, found, stride, Q_KIND)
    if N == "tensor":
        made = load(n, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    elif N != "none":
        made = made_noise(seed, ids, stream, sample_offset, strength, q_row, run, block, place, units, sample_runs,
                          channel_runs, SEED, OFFSET, C, UNIT, SAMPLES, N == "fast", ASM, EMULATE)  # fmt: skip
    if N == "fast":  # the product is in it, and is taken into the difference
        e = e - made
    if P_KIND != "none":
        p_row = coefficient(p, row, entry, found, stride, P_KIND)
        data = load(x0, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        if N == "tensor" or N == "exact":
            e = e - tl.fma(p_row, data, q_row * made)
        else:
            e = tl.fma(-p_row, data, e)
    elif N == "tensor" or N == "exact":
        e = tl.fma(-q_row, made, e)
    factor = coefficient(scale, row, entry, found, stride, SCALE_KIND)
    d = factor * e
    log_variance = coefficient(l_0, row, entry, found, stride, L_0_KIND)
    if L_V_KIND != "none":
        spread = coefficient(l_v, row, entry, found, stride, L_V_KIND)
        v = load(prediction, second, place, inside, EVEN, UNIT, ASM, EMULATE)
        log_variance = tl.fma(spread, v, log_variance)
    true_log_variance = coefficient(l_q, row, entry, found, stride, L_Q_KIND)
    strong = coefficient(weight, row, entry, found, stride, WEIGHT_KIND)

    if HALF_WIDTH_KIND == "none":
        rho, by_d, by_log_variance = _gaussian(d, log_variance, true_log_variance, row == row, ASM, EMULATE)
    else:
        half_bin = coefficient(half_width, row, entry, found, stride, HALF_WIDTH_KIND)
        rho, by_d, by_log_variance = _gaussian(d, log_variance, true_log_variance, half_bin < 0, ASM, EMULATE)
        in_bins = tl.where(half_bin <= 0, 0, 1)  # NaN is a bin: its terms are NaN
        if R > 1:
            some = tl.max(in_bins)
        else:
            some = in_bins
        if some > 0:
            if P_KIND == "none":
                wanted = tl.broadcast_to(in_bins > 0, d.shape)
                if not EVEN:
                    wanted = wanted & inside
                data = load(x0, start, place, wanted, False, UNIT, ASM, EMULATE)
            in_bin = tl.broadcast_to(in_bins > 0, d.shape)
            of_bin, bin_by_d, bin_by_log_variance = _bin(d, log_variance, half_bin, data, ASM, EMULATE)
            rho = tl.where(in_bin, of_bin, rho)
            by_d = tl.where(in_bin, bin_by_d, by_d)
            by_log_variance = tl.where(in_bin, bin_by_log_variance, by_log_variance)
    # A term of weight 0 is left out, whatever it holds.
    left_out = tl.broadcast_to(strong == 0, e.shape)
    if SIMPLE_WEIGHT_KIND != "none":
        simple = coefficient(simple_weight, row, entry, found, stride, SIMPLE_WEIGHT_KIND)
        no_square = tl.broadcast_to(simple == 0, e.shape)

    if gradient is not None:
        if UPSTREAM != "none":
            outer = coefficient(upstream, row, entry, found, stride, UPSTREAM)
        else:
            outer = tl.load(assumed)
            outer = tl.where(outer == 0, 1.0, outer)  # 0: nothing has come yet
            tl.store(used, outer, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
        outer = outer * both
        slope = tl.zeros_like(e)
        if not FREEZE_MEAN:
            slope = tl.where(left_out, 0.0, (outer * strong * factor) * by_d)
        if SIMPLE_WEIGHT_KIND != "none":
            slope += tl.where(no_square, 0.0, (2.0 * outer * simple) * e)
        store(gradient, first, place, slope, inside, EVEN, EMULATE)
        if L_V_KIND != "none":
            slope = tl.where(left_out, 0.0, (outer * strong * spread) * by_log_variance)
            store(gradient, second, place, slope, inside, EVEN, EMULATE)

    if result is not None:
        value = tl.where(left_out, 0.0, strong * rho)
        if SIMPLE_WEIGHT_KIND != "none":
            value += tl.where(no_square, 0.0, simple * (e * e))
        if not EVEN:
            value = tl.where(inside, value, 0.0)
        reduce_terms(value, run, block, result, counters, partials, number, rows, parts, runs, blocks, per, frames,
                     shared, size, size_low, mean, REDUCTION, LANES, SPLIT, ROWS, R, EMULATE)  # fmt: skip


def declines(call: GaussianCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    output, x0, n, *coefficients = call[:12]
    because = unsuited(output.device, (output, x0, n), tuple(coefficients))
    if because:
        return because
    if differentiable(x0, n, *coefficients):
        return COEFFICIENTS
    own = own_rows(tuple(call.shape), shape_of(call.weight), *coefficients)
    return "" if own else "rows that alternate too often for a layout"


class Written(NamedTuple):
    """A gradient that was written along with its loss, the upstream gradient that it was made for, and the cell that
    this came from."""

    gradient: Tensor
    used: Tensor
    cell: Cell


def run(call: GaussianCall, backend: Backend) -> Tensor:
    """See ``GaussianCall``; the coefficients may be ``Gathered``."""
    output, rows = call.output, shape_of(call.weight)
    result = torch.empty(rows if call.reduction == "none" else (), dtype=torch.float32, device=output.device)
    if not differentiable(output):
        _launch(call, result=result)
        return result
    written = None
    if ahead(output) and call.reduction != "none":
        types = (t.dtype if isinstance(t, Tensor) else type(t) for t in call[:3])
        last = cell(output.device, (call.operation, output.shape, call.freeze_mean, call.reduction, *types))
        written = Written(*_new(output), last)
        _launch(call, written.gradient, used=written.used, assumed=last.value, result=result)
    else:
        _launch(call, result=result)
    return recorded(result, written, call, 12, _again, backend.otherwise)


def gradient(upstream: Tensor, call: GaussianCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    return _again(call, upstream, None)


def _new(output: Tensor) -> tuple[Tensor, Tensor]:
    made = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    return made, torch.empty(1, dtype=torch.float32, device=output.device)


def _again(call: GaussianCall, upstream: Tensor, written: Written | None) -> Tensor:
    """The gradient for ``upstream``."""
    upstream = upstream.to(torch.float32)
    if written is None:
        made = _new(call.output)[0]
        _launch(call, made, upstream=upstream)
        return made
    assumed = of_this_stream(written.cell, call.output.device).value
    _launch(call, written.gradient, used=written.used, assumed=assumed, upstream=upstream)
    return written.gradient


def _launch(
    call: GaussianCall, gradient: Tensor | None = None, *,
    used: Tensor | None = None, assumed: Tensor | None = None, upstream: Any = None, result: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the kernel for the sums, the gradient, or both."""
    output, x0, n = (t.contiguous() if isinstance(t, Tensor) else t for t in call[:3])
    shape, device, rows_shape = tuple(call.shape), output.device, shape_of(call.weight)
    rows = arrange(shape, *call[3:12], upstream, rows=rows_shape)
    source, (kind, seed_kind, offset) = source_of(n if call.q is not None else None, device)
    elements = call.halves[0].numel()
    within_samples = kind in ("exact", "fast") or call.l_v is not None
    tile = tile_of(elements, output.element_size())
    if call.half_width is not None:
        tile = min(tile, BIN_TILE)
    how = plan(shape, rows_shape, tile, within_samples, offset, True)
    *constants, wide = how.constants
    number = how.rows if how.parts > 1 else how.grid[0]
    counters = partials = None
    if result is not None:
        counters, partials = loss_workspace(device, how.rows, how.parts, number)
    size = 1.0 if call.reduction == "sum" else elements / how.rows
    mean = 1.0 / how.rows if call.reduction == "mean" else 1.0
    *pointers, up = rows.pointers
    reads_x0 = call.p is not None or call.half_width is not None
    gaussian_kl(
        device,
        how.grid,
        (
            *(output, x0 if reads_x0 else None, n if kind == "tensor" else None, gradient, *pointers, rows.index),
            *(*source[:2], up, used, assumed, result, counters, partials),
            *(*source[2:], high := float32(size), size - high, mean, mean / size, how.rows, how.parts, number),
            *(rows.steps, rows.stride, *how.numbers, how.sample_runs, how.channel_runs),
        ),
        (
            *(*rows.kinds, rows.index_kind, kind, seed_kind, offset, call.freeze_mean, call.reduction),
            *(8 if launch.INTERPRETED else 128, how.parts > 1, *constants, wide or output.numel() + 4096 >= 2**31),
            *(launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )
