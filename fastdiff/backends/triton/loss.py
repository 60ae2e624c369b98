"""The loss on a GPU, and its gradient.

The reduction is in the same launch: the last program of a row adds up the row's tiles, the last of all programs adds up
the rows. Each is found by a counter that it resets. Sums across tiles, weights and divisors are pairs of float32,
rounded once; within a tile the sum is plain, except under a normalised mask. There is no atomic addition to a float,
and no float64.

The gradient is written in the same pass where it can be: for the upstream gradient that came last to this loss (1 at
first), so a loss that is divided or scaled alike each time costs nothing more. That upstream gradient is kept on the
device (``workspace.Cell``). Backward is one launch that compares on the device, and computes the gradient again if
another upstream gradient has come. Float16, and masks that normalise, compute the gradient in the backward; so does a
loss by elements, whose errors are stored and not summed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ... import modes
from ...calls import Combination, LossCall
from ...tensors import Gathered
from ..interface import COEFFICIENTS, Backend, differentiable, weight_of_elements
from ..layout import of_rows
from ..reference import rows_of_mean
from ..saving import save, saved
from . import launch
from .arguments import TYPES, source_of, starts_on, too_many, unsuited
from .coefficients import arrange, shape_of
from .functions import combined_derivative, combined_error, derivative, error, reciprocal
from .laid import Laid, as_prediction, lay, like_prediction, own_rows
from .launch import Kernel
from .plan import mask_of, order_of, plan, plan_of_sequences, tile_of
from .reduction import finish, is_last, store_pair, tile_sum, total_of
from .tiles import (
    coefficient,
    entry_of,
    laid_out,
    load,
    load_mask,
    made_noise,
    place_of,
    place_packed,
    prefetch,
    row_of,
    spot_of,
    store,
)
from .workspace import Cell, cell, loss_workspace, of_this_stream, single


@Kernel
def loss(
    prediction, x0, n, third, gradient, mask, errors, d_errors, p, q, scale, weight, c, r, index, seed, ids, starts,
    upstream, used, assumed, result, means, divisor, counters, partials,
    stream, sample_offset, strength, size, size_low, mean, both,
    mse, l1, smooth_l1, pseudo_huber, log_cosh, c_smooth_l1, c_pseudo_huber,
    m1, m2, m3, s0, s1, s2, s3, s4, rows, averaged, parts, number,
    steps, stride, units, runs, blocks, per, frames, shared, sample_runs, channel_runs,
    c_size, c_factor, c_shift, h_size, h_factor, h_shift, w_size, w_factor, w_shift,
    P_KIND: tl.constexpr, Q_KIND: tl.constexpr, SCALE_KIND: tl.constexpr, WEIGHT_KIND: tl.constexpr,
    C_KIND: tl.constexpr, R_KIND: tl.constexpr, UPSTREAM: tl.constexpr, INDEX: tl.constexpr,
    N: tl.constexpr, SEED: tl.constexpr, OFFSET: tl.constexpr, MASK_DIMS: tl.constexpr,
    TOGETHER: tl.constexpr, ORDER: tl.constexpr, PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr, IN_ROW: tl.constexpr,
    FUNCTION: tl.constexpr, NORMALIZATION: tl.constexpr, REDUCTION: tl.constexpr, LANES: tl.constexpr,
    SPLIT: tl.constexpr, OWN: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr, SAMPLES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """weight mask rho(scale (prediction - p x0 - q n - r y); c), y being ``third``. Writes the sums if there is a
    ``result``, and the gradient by the prediction if there is a ``gradient``.

    In a forward pass the upstream gradient is not known yet: the gradient is made for ``assumed``, which is noted in
    ``used``. In a backward pass it is made for ``upstream``. If a forward pass wrote a gradient and ``upstream`` equals
    ``used``, that gradient is right, and nothing is done. Prediction and gradient may lie in another ORDER.

    If there are ``errors``, the weighted error of each element is stored there. ``d_errors``: the upstream gradient of
    each. Both lie as the prediction does.

    Args:
        number: how many sums the last stage adds up.
        size, size_low: how many elements a row has, as a pair of float32; 1 for reduction "sum". OWN: each packed
            sequence has its own ("yes"), an empty one that of one element ("or one"); otherwise "no".
        mse, ..., log_cosh, c_smooth_l1, c_pseudo_huber: the strengths and constants of a weighted sum of error
            functions, of FUNCTION "combined"; a constant of NaN is the row's.
        averaged: how many rows a mean is over where no mask's sum divides.
        mean: 1 / averaged for reduction "mean", otherwise 1.
        both: mean / size.
        divisor: where the mask's sum divides, the factor of the gradients: one number ("global"); or one a row, and
            after them 1 / (the number of rows with something in the mask) ("row").

    A row is whole in a program, or SPLIT over ``parts`` programs. The last of them to end adds their sums up, always in
    the same order.

    An element under a mask of 0, and a row of weight 0, add 0, whatever they hold.
    """
    if UPSTREAM != "none" and used is not None:
        came = tl.load(upstream)
        if came == tl.load(used):
            return
        tl.store(assumed, came, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))

    own_parts = parts
    if GRID == "packed":
        run, block, start, place, inside, units = place_packed(starts, C, UNIT, WIDE)
        if (block * C >= units * UNIT) & (block > 0):
            return
        own_parts = tl.maximum((units * UNIT + C - 1) // C, 1)
    else:
        run, block, start, place, inside = place_of(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    if OWN != "no":
        elements = units * UNIT
        size = elements.to(tl.float32)
        size_low = (elements - size.to(tl.int64)).to(tl.float32)
        both = mean / size
        if OWN == "or one":
            size = tl.where(elements == 0, 1.0, size)
    if N != "none" and N != "tensor":
        if ORDER == "none":
            prefetch(prediction, start, block, units, R, C, UNIT, EVEN, ASM)
        if P_KIND != "none":
            prefetch(x0, start, block, units, R, C, UNIT, EVEN, ASM)
        if R_KIND != "none":
            prefetch(third, start, block, units, R, C, UNIT, EVEN, ASM)
    row = row_of(run, per, frames, shared, ROWS)
    entry, found = entry_of(index, row, steps, INDEX)
    own_start, own_place = spot_of(start, place, (c_size, c_factor, c_shift), (h_size, h_factor, h_shift),
        (w_size, w_factor, w_shift), ORDER, PATCH_P, PATCH_Q, IN_ROW)  # fmt: skip
    e = load(prediction, own_start, own_place, inside, EVEN, UNIT, ASM, EMULATE)
    if N != "none":
        q_row = coefficient(q, row, entry, found, stride, Q_KIND)
    made_at = place
    if ORDER != "none" and N != "none" and N != "tensor":
        # Where a tile of the prediction would lie is read only so that each thread makes four normals of a counter.
        tile = load(prediction, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        made_at = laid_out(place, tile, EMULATE)
    if N == "tensor":
        made = load(n, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    elif N != "none":
        made = made_noise(seed, ids, stream, sample_offset, strength, q_row, run, block, made_at, units, sample_runs,
                          channel_runs, SEED, OFFSET, C, UNIT, SAMPLES, N == "fast", ASM, EMULATE)  # fmt: skip
    if N == "fast":  # the product is in it, and is taken into the difference
        e = e - made
    if R_KIND != "none":
        r_row = coefficient(r, row, entry, found, stride, R_KIND)
        further = load(third, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if P_KIND != "none":
        p_row = coefficient(p, row, entry, found, stride, P_KIND)
        data = load(x0, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        if N == "tensor" or N == "exact":
            if R_KIND != "none":
                e = e - tl.fma(q_row, made, tl.fma(p_row, data, r_row * further))
            else:
                e = e - tl.fma(p_row, data, q_row * made)
        elif R_KIND != "none":
            e = e - tl.fma(p_row, data, r_row * further)
        else:
            e = tl.fma(-p_row, data, e)
    elif R_KIND != "none":
        if N == "tensor" or N == "exact":
            e = e - tl.fma(r_row, further, q_row * made)
        else:
            e = tl.fma(-r_row, further, e)
    elif N == "tensor" or N == "exact":
        e = tl.fma(-q_row, made, e)
    if SCALE_KIND != "none":
        factor = coefficient(scale, row, entry, found, stride, SCALE_KIND)
        e = factor * e
    constant, inverse = 1.0, 1.0
    if C_KIND != "none":
        constant = coefficient(c, row, entry, found, stride, C_KIND)
        inverse = reciprocal(constant)
    if MASK_DIMS >= 0:
        kept = load_mask(
            mask, start, place, inside, (m1, m2, m3), (s0, s1, s2, s3, s4), MASK_DIMS, TOGETHER, UNIT, EVEN
        )
    if WEIGHT_KIND != "none":
        strong = coefficient(weight, row, entry, found, stride, WEIGHT_KIND)

    if gradient is not None:
        if d_errors is not None:
            outer = load(d_errors, own_start, own_place, inside, EVEN, UNIT, ASM, EMULATE)
        elif UPSTREAM != "none":
            outer = coefficient(upstream, row, entry, found, stride, UPSTREAM)
        else:
            outer = tl.load(assumed)
            outer = tl.where(outer == 0, 1.0, outer)  # 0: nothing has come yet
            tl.store(used, outer, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
        if NORMALIZATION == "row":
            k = strong * outer * tl.load(divisor + row)
            if REDUCTION == "mean":
                k = k * tl.load(divisor + rows)
        elif NORMALIZATION == "global":
            k = strong * outer * tl.load(divisor)
        else:
            k = strong * outer * both
        if SCALE_KIND != "none":
            k = k * factor
        if FUNCTION == "mse":
            slope = (2.0 * k) * e
        elif FUNCTION == "combined":
            slope = k * combined_derivative(e, constant, mse, l1, smooth_l1, pseudo_huber, log_cosh, c_smooth_l1,
                                            c_pseudo_huber, ASM)  # fmt: skip
        else:
            slope = k * derivative(e, inverse, FUNCTION, ASM)
        if MASK_DIMS >= 0:
            slope = tl.where(kept == 0, 0.0, slope * kept)
        # Of a row that is left out zeros are stored in place of the slope: that is a predicate, not one more
        # instruction an element.
        weights = tl.broadcast_to(strong, slope.shape)
        learns, left_out = weights != 0, weights == 0
        if not EVEN:
            learns, left_out = inside & learns, inside & left_out
        store(gradient, own_start, own_place, slope, learns, False, EMULATE)
        store(gradient, own_start, own_place, tl.zeros_like(slope), left_out, False, EMULATE)

    if result is not None or errors is not None:
        if FUNCTION == "combined":
            value = combined_error(e, constant, mse, l1, smooth_l1, pseudo_huber, log_cosh, c_smooth_l1,
                                   c_pseudo_huber, ASM)  # fmt: skip
        else:
            value = error(e, constant, inverse, FUNCTION, ASM)
        if MASK_DIMS >= 0:
            value = tl.where(kept == 0, 0.0, value * kept)

    if errors is not None:
        store(errors, own_start, own_place, tl.where(strong == 0, 0.0, strong * value), inside, EVEN, EMULATE)

    if result is not None:
        if not EVEN:
            value = tl.where(inside, value, 0.0)
        if R > 1:
            whole = tl.program_id(0) * R + tl.arange(0, R)
            there = whole < runs
            row = tl.minimum(whole, runs - 1)
            row = row_of(row, per, frames, shared, ROWS)
            entry, found = entry_of(index, row, steps, INDEX)
            strong = coefficient(weight, row, entry, found, stride, WEIGHT_KIND)
        else:
            there = row >= 0
        # Tiles are added up in pairs. Within one a plain sum will do: its roundings are many and independent, and those
        # of a thread 1/100 of the whole. Not so for the quotient of two sums.
        total, total_low = tile_sum(value, NORMALIZATION != "none", R, EMULATE)
        count, count_low = total * 0.0, total_low
        if NORMALIZATION != "none":
            if not EVEN:
                kept = tl.where(inside, kept, 0.0)
            # Of bytes a plain sum is exact: a tile has at most 2^12.
            BYTES: tl.constexpr = mask.dtype.element_ty.primitive_bitwidth == 8
            count, count_low = tile_sum(kept, not BYTES, R, EMULATE)
        place = tl.program_id(0)
        if SPLIT:
            if ROWS == "run":
                part = row * parts + block
            else:
                stretch = run // per
                part = row * parts + (stretch // frames % shared * per + run % per) * blocks + block
            everything = rows * parts
            store_pair(partials + part, everything, total, total_low, there)
            if NORMALIZATION != "none":
                store_pair(partials + 2 * everything + part, everything, count, count_low, there)
            if is_last(counters + 1 + row, own_parts):
                total, total_low = total_of(partials + row * parts, own_parts, everything, LANES)
                if NORMALIZATION != "none":
                    count, count_low = total_of(partials + 2 * everything + row * parts, own_parts, everything, LANES)
                finish(row, there, total, total_low, count, count_low, strong, result, means, divisor, counters,
                        partials + 4 * everything, number, row, rows, averaged, size, size_low, mean,
                        NORMALIZATION, REDUCTION, R, LANES, EMULATE)  # fmt: skip
        else:
            finish(row, there, total, total_low, count, count_low, strong, result, means, divisor, counters,
                    partials, number, place, rows, averaged, size, size_low, mean,
                    NORMALIZATION, REDUCTION, R, LANES, EMULATE)  # fmt: skip


def declines(call: LossCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    prediction, x0, n, p, q, scale, weight, c, mask, y, r = _needed(call)[:11]
    because = unsuited(prediction.device, (prediction, x0, n, y), (p, q, scale, weight, c, r), images=True)
    if because:
        return because
    fixed = x0, n, p, q, scale, c, mask, y, r, *weight_of_elements(call)
    if differentiable(*fixed) or (isinstance(weight, Gathered) and differentiable(weight)):
        return COEFFICIENTS
    if call.packed is not None and (because := too_many(call.packed)):
        return because
    if call.packed is None and not own_rows(tuple(prediction.shape), shape_of(weight), p, q, scale, c, r):
        return "rows that alternate too often for a layout"
    return "" if mask is None or (type(mask) in TYPES and mask.dtype in launch.POINTERS) else "a mask of another dtype"


def _needed(call: LossCall) -> LossCall:
    """``call`` without what its formula does not use."""
    if call.p is None or call.x0 is None:
        call = call._replace(p=None, x0=None)
    if call.q is None or call.n is None:
        call = call._replace(q=None, n=None)
    if call.r is None or call.y is None:
        call = call._replace(r=None, y=None)
    return call._replace(mask_normalization="none") if call.mask is None and call.packed is None else call


def masks_divide(call: LossCall) -> bool:
    """Whether sums of the mask divide."""
    return call.mask is not None and call.mask_normalization != "none"


class Made(NamedTuple):
    """The results of one pass.

    Attributes:
        value: the loss; of elements, their errors.
        means: the mean of each row, as pairs of float32 [2, rows]; None if it was not asked for.
        divisor: the factors of gradients where the mask's sum divides; otherwise None.
        written: the gradient by the prediction, the upstream gradient that it was made for, and the cell that this came
            from; None if no gradient was written along.
    """

    value: Tensor
    means: Tensor | None = None
    divisor: Tensor | None = None
    written: tuple[Tensor, Tensor, Cell] | None = None


def run(call: LossCall, backend: Backend) -> Tensor:
    """See ``LossCall``; the coefficients may be ``Gathered``."""
    call = _needed(call)
    prediction, weight = call.prediction, call.weight
    if not differentiable(prediction, weight):
        return _pass(call).value
    written = ahead(prediction) and call.reduction in ("mean", "sum") and not masks_divide(call)
    made, how = _pass(call, means=differentiable(weight), gradient=written), call[11:]
    divisor = made.divisor  # of ``made`` no more is held: its cell is waiting as long as somebody holds it

    def again(tensors: Sequence[Any], upstream: Tensor, written: Any) -> Tensor:
        return _gradient(LossCall(*tensors, *how), upstream, divisor, written)

    call_of = lambda *tensors: LossCall(*tensors, *how)  # noqa: E731
    return recorded(prediction, weight, made, call[:11], call_of, again, backend.otherwise)


def ahead(prediction: Tensor) -> bool:
    """Whether the gradient may be written along with the loss. Not for float16: its loss is scaled, and the size of its
    gradient is known only in the backward."""
    return differentiable(prediction) and prediction.dtype is not torch.float16


class _Loss(torch.autograd.Function):
    """Attaches a gradient to a loss that has been computed already.

    ``made`` is a ``Made``. ``kept`` are the tensors that the loss was computed from; ``call_of(*kept)`` makes its
    ``LossCall`` again. ``again(tensors, upstream, written)`` gives the gradient, where ``written`` is ``made.written``
    or None. ``otherwise`` is the fallback that computes second derivatives."""

    @staticmethod
    def forward(ctx, prediction, weight, made, kept, call_of, again, otherwise):
        save(ctx, *kept)
        value, ctx.means, _, ctx.written = made
        ctx.call_of, ctx.again, ctx.otherwise = call_of, again, otherwise
        return value

    @staticmethod
    def backward(ctx, upstream):
        for_prediction, for_weight = ctx.needs_input_grad[:2]
        tensors = saved(ctx)
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            call = ctx.call_of(*tensors)
            inputs = [t for t, needed in ((call.prediction, for_prediction), (call.weight, for_weight)) if needed]
            found = iter(torch.autograd.grad(ctx.otherwise.run(call), inputs, upstream, create_graph=True))
            return next(found) if for_prediction else None, next(found) if for_weight else None, *(None,) * 5
        gradient = d_weight = None
        if for_prediction and modes.is_many(upstream):
            gradient = ctx.otherwise.gradient(upstream, ctx.call_of(*tensors))
        elif for_prediction:
            # What was written ahead is given away once; whoever gets it may add to it.
            written, ctx.written = ctx.written, None
            gradient = ctx.again(tensors, upstream, written)
        if for_weight:
            call = ctx.call_of(*tensors)
            count = rows_of_mean(call) if call.reduction == "mean" else 1
            d_weight = (upstream.double() * ctx.means.double().sum(0) / count).to(call.weight.dtype)
        return gradient, d_weight, *(None,) * 5


# (prediction, weight, made, kept, call_of, again, otherwise) -> the loss, recorded for autograd: see
# ``_Loss``. It is what Function.apply comes to where no transform is at work.
recorded = super(torch.autograd.Function, _Loss).apply


def gradient(upstream: Tensor, call: LossCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    call = _needed(call)
    divisor = _pass(call).divisor if masks_divide(call) else None
    return _gradient(call, upstream, divisor, None)


def value_and_gradient(upstream: Tensor | float, call: LossCall, backend: Backend) -> tuple[Tensor, Tensor]:
    """See ``Backend.value_and_gradient``."""
    call, upstream = _needed(call), single(upstream, call.prediction.device)
    if not masks_divide(call):
        made = _pass(call, gradient=True, upstream=upstream)
        return made.value, made.written[0]
    made = _pass(call)
    return made.value, _gradient(call, upstream, made.divisor, None)


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def _pass(call: LossCall, *, means: bool = False, gradient: bool = False, upstream: Tensor | None = None) -> Made:
    laid, how = lay(call), call[11:14]
    device, rows = call.prediction.device, laid.rows_shape
    function, normalization, reduction = how

    def new(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    elements = reduction == "elements"
    errors = like_prediction(laid, torch.float32) if elements else None
    result = None if elements else new(rows if reduction == "none" else ())
    row_means = new((2, *rows)) if means else None
    divisor = None if not masks_divide(call) else new(math.prod(rows) + 1 if normalization == "row" else 1)
    used = last = assumed = None
    d = like_prediction(laid) if gradient else None
    if upstream is not None:
        upstream = laid.ordered(upstream.resolve_neg()).to(torch.float32)
    elif gradient:
        used, last = new(1), cell(device, _kind(laid, function, reduction))
        assumed = last.value
    launched = loss_launch(
        laid, *how, d, used=used, assumed=assumed, upstream=upstream, result=result, means=row_means, divisor=divisor,
        errors=errors,
    )  # fmt: skip
    loss(device, *launched)
    if elements:
        return Made(errors if laid.back is None else errors.permute(laid.back))
    if laid.back is not None:
        result = result.permute(laid.back).contiguous() if reduction == "none" else result
        row_means = row_means if row_means is None else row_means.permute(0, *(1 + k for k in laid.back))
        d = d if d is None else d.permute(laid.back)
    return Made(result, row_means, divisor, None if d is None else (d, used, last))


def _kind(laid: Laid, function: str | Combination, reduction: str) -> tuple:
    """A key that tells a loss apart from others. It is a hint, see ``workspace.cell``."""
    types = (t.dtype if isinstance(t, Tensor) else type(t) for t in laid.data)
    tables = (c.column.data_ptr() for c in laid.coefficients if isinstance(c, Gathered))
    return (laid.shape, function, reduction, *types, *tables)


def _gradient(
    call: LossCall, upstream: Tensor, divisor: Tensor | None, written: tuple[Tensor, Tensor, Cell] | None
) -> Tensor:
    """The gradient of the prediction for ``upstream``; ``written``: see ``Made``."""
    laid, prediction = lay(call), call.prediction
    used = assumed = None
    if written is None:
        d = like_prediction(laid)
    else:
        d, used, last = written
        d = laid.ordered(d)
        assumed = of_this_stream(last, prediction.device).value
    upstream, d_errors = laid.ordered(upstream.resolve_neg()).to(torch.float32), None
    if call.reduction == "elements":
        by_row = of_rows(upstream, laid.rows_shape, laid.packed)
        upstream, d_errors = by_row, as_prediction(laid, upstream) if by_row is None else None
    launched = loss_launch(
        laid, *call[11:14], d, used=used, assumed=assumed, upstream=upstream, divisor=divisor, d_errors=d_errors
    )  # fmt: skip
    loss(prediction.device, *launched)
    return d if laid.back is None else d.permute(laid.back)


def loss_launch(
    laid: Laid, function, normalization, reduction, gradient, *,
    used=None, assumed=None, upstream=None, result=None, means=None, divisor=None, errors=None, d_errors=None,
) -> tuple[tuple[int, int], tuple, tuple]:  # fmt: skip
    """The launch of a loss, of its gradient, or of both: (grid, arguments, constants)."""
    prediction, x0, n, y = laid.data
    weight, p, q, scale, c, r = laid.coefficients
    shape, device = laid.shape, prediction.device
    rows = arrange(shape, p, q, scale, weight, c, r, upstream, rows=laid.rows_shape)
    source, (kind, seed_kind, offset) = source_of(n, device)
    elements = prediction.numel()
    tile = tile_of(elements, prediction.element_size())
    packed, masked, starts = laid.packed, laid.mask is not None, None
    own, averaged = "no", math.prod(laid.rows_shape)
    if packed is None:
        how = plan(shape, laid.rows_shape, tile, kind in ("exact", "fast"), offset, True)
    else:
        how, starts = plan_of_sequences(packed, shape, tile), starts_on(device, packed)
        by_row = normalization == "row" and not masked
        own = "or one" if by_row else "yes" if normalization == reduction == "none" else "no"
        if by_row and reduction == "mean":
            averaged = max(1, int((packed.sizes != 0).sum()))
        normalization = normalization if masked else "none"
    columns, unit = how.constants[2:4]
    numbers, ordered = order_of(laid.order, shape, how)
    mask = mask_of(*laid.mask_strides, unit if columns % unit == 0 else 1)
    split = how.parts > 1 or packed is not None
    number = how.rows if split else how.grid[0]
    counters = partials = None
    if result is not None:
        counters, partials = loss_workspace(device, how.rows, how.parts, number)
    size = 1.0 if reduction in ("sum", "elements") else elements / how.rows
    mean = 1.0 / averaged if reduction == "mean" else 1.0
    *pointers, up = rows.pointers
    strengths = (None,) * len(Combination._fields)
    if isinstance(function, Combination):
        strengths, function = tuple(math.nan if number is None else number for number in function), "combined"
    return (
        how.grid,
        (
            *(prediction, x0, n if kind == "tensor" else None, y, gradient, laid.mask, errors, d_errors),
            *(*pointers, rows.index, *source[:2], starts),
            *(up, used, assumed, result, means, divisor, counters, partials),
            *(*source[2:], high := float32(size), size - high, mean, mean / size, *strengths),
            *(*mask.numbers, how.rows, averaged, how.parts, number),
            *(rows.steps, rows.stride, *how.numbers, how.sample_runs, how.channel_runs, *numbers),
        ),
        (
            *(*rows.kinds, rows.index_kind, kind, seed_kind, offset, mask.dims, mask.together, *ordered),
            *(function, normalization, reduction, 8 if launch.INTERPRETED else 128, split, own),
            *(*how.constants, launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )
