"""The loss on a GPU, and its gradient.

The reduction is in the same launch: the last program of a row adds up the row's tiles, the last of all programs adds up
the rows. Each is found by a counter that it resets. Sums across tiles, weights and divisors are pairs of float32,
rounded once; within a tile the sum is plain, except under a normalised mask. There is no atomic addition to a float,
and no float64.

The gradient is written in the same pass where it can be: for the upstream gradient that came last to this loss (1 at
first), so a loss that is divided or scaled alike each time costs nothing more. That upstream gradient is kept on the
device (``workspace.Cell``). Backward is one launch that compares on the device, and computes the gradient again if
another upstream gradient has come. Float16, and masks that normalise, compute the gradient in the backward.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import modes
from ...calls import LossCall
from ...codes import NEED_C
from ...tensors import Gathered
from ..interface import COEFFICIENTS, Backend, differentiable
from ..layout import layout_of
from ..reference import rows_of_mean
from ..saving import save, saved
from . import launch
from .arguments import TYPES, permuted, source_of, unsuited
from .coefficients import arrange, is_one, shape_of
from .plan import mask_of, plan, strided, tile_of
from .workspace import Cell, cell, of_this_stream, workspace

_NO_STRIDES = (1,) * 3 + (0,) * 4


def declines(call: LossCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    prediction, x0, n, p, q, scale, weight, c, mask = _needed(call)[:9]
    because = unsuited(prediction.device, (prediction, x0, n), (p, q, scale, weight, c))
    if because:
        return because
    if differentiable(x0, n, p, q, scale, c, mask) or (isinstance(weight, Gathered) and differentiable(weight)):
        return COEFFICIENTS
    if not _own_rows(tuple(prediction.shape), shape_of(weight), p, q, scale, c):
        return "rows that alternate too often for a layout"
    return "" if mask is None or (type(mask) in TYPES and mask.dtype in launch.POINTERS) else "a mask of another dtype"


def _needed(call: LossCall) -> LossCall:
    """``call`` without what its formula does not use."""
    if call.p is None or call.x0 is None:
        call = call._replace(p=None, x0=None)
    if call.q is None or call.n is None:
        call = call._replace(q=None, n=None)
    if call.c is not None and call.function not in NEED_C:
        call = call._replace(c=None)
    return call._replace(mask_normalization="none") if call.mask is None else call


class Made(NamedTuple):
    """The results of one pass.

    Attributes:
        value: the loss.
        means: the mean of each row, as pairs of float32 [2, rows]; None if it was not asked for.
        divisor: the factors of gradients where the mask's sum divides; otherwise None.
        written: the gradient by the prediction, the upstream gradient that it was made for, and the cell that this came
            from; None if no gradient was written along.
    """

    value: Tensor
    means: Tensor | None = None
    divisor: Tensor | None = None
    written: tuple[Tensor, Tensor, Cell] | None = None


def loss(call: LossCall, otherwise: Backend) -> Tensor:
    """See ``LossCall``; the coefficients may be ``Gathered``."""
    call = _needed(call)
    prediction, weight = call.prediction, call.weight
    if not differentiable(prediction, weight):
        return _pass(call).value
    written = ahead(prediction) and call.reduction != "none" and call.mask_normalization == "none"
    made, how = _pass(call, means=differentiable(weight), gradient=written), call[-3:]
    divisor = made.divisor  # of ``made`` no more is held: its cell is waiting as long as somebody holds it

    def again(tensors: Sequence[Any], upstream: Tensor, written: Any) -> Tensor:
        return _gradient(LossCall(*tensors, *how), upstream, divisor, written)

    return recorded(prediction, weight, made, call[:9], lambda *tensors: LossCall(*tensors, *how), again, otherwise)


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
            found = iter(torch.autograd.grad(ctx.otherwise.loss(call), inputs, upstream, create_graph=True))
            return next(found) if for_prediction else None, next(found) if for_weight else None, *(None,) * 5
        gradient = d_weight = None
        if for_prediction and modes.is_many(upstream):
            gradient = ctx.otherwise.loss_gradient(upstream, ctx.call_of(*tensors))
        elif for_prediction:
            # What was written ahead is given away once; whoever gets it may add to it.
            written, ctx.written = ctx.written, None
            gradient = ctx.again(tensors, upstream, written)
        if for_weight:
            call = ctx.call_of(*tensors)
            of = call.prediction, call.weight, call.mask, call.mask_normalization
            count = rows_of_mean(*of) if call.reduction == "mean" else 1
            d_weight = (upstream.double() * ctx.means.double().sum(0) / count).to(call.weight.dtype)
        return gradient, d_weight, *(None,) * 5


_apply = super(torch.autograd.Function, _Loss).apply  # what Function.apply comes to where no transform is at work


def recorded(
    prediction: Tensor,
    weight: Any,
    made: tuple,
    kept: Sequence[Any],
    call_of: Callable[..., LossCall],
    again: Callable[..., Tensor],
    otherwise: Backend,
) -> Tensor:
    """The loss of ``made``, recorded for autograd: see ``_Loss``."""
    return _apply(prediction, weight, made, kept, call_of, again, otherwise)


def loss_gradient(upstream: Tensor, call: LossCall) -> Tensor:
    """See ``Backend.loss_gradient``."""
    call = _needed(call)
    divisor = None if call.mask_normalization == "none" else _pass(call).divisor
    return _gradient(call, upstream, divisor, None)


def _own_rows(shape: tuple[int, ...], own: tuple[int, ...], *others: Any) -> bool:
    """Whether the rows of the weight, and of the other coefficients, are rows of one layout: then each has one sum."""
    for other in others:
        rows = shape_of(other)
        if rows and rows != own:
            spread = other.index if isinstance(other, Gathered) else other
            if not is_one(spread):
                return False
    return layout_of(shape, own)[1] == own


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


class Laid(NamedTuple):
    """The operands of a loss, laid out for the kernel. ``back`` leads from its order of dimensions to the caller's."""

    back: tuple[int, ...] | None
    shape: tuple[int, ...]
    rows_shape: tuple[int, ...]
    data: list
    coefficients: list
    mask: Tensor | None
    mask_strides: tuple[int, tuple[int, ...]]  # see ``plan.strided``; -1 dimensions where there is no mask


def lay(call: LossCall) -> Laid:
    """The operands of ``call``."""
    prediction, x0, n, p, q, scale, weight, c, mask = call[:9]
    coefficients = (weight, p, q, scale, c)
    own, shape = shape_of(weight), tuple(prediction.shape)
    back, data, placed = permuted((prediction, x0, n), coefficients)
    if back is not None and not _own_rows(tuple(data[0].shape), shape_of(placed[0])):
        data, placed, back = [t if t is None else t.contiguous() for t in (prediction, x0, n)], list(coefficients), None
    if back is not None:
        shape, own = tuple(data[0].shape), shape_of(placed[0])
    strides = -1, _NO_STRIDES
    if mask is not None:
        if mask.dtype == torch.float64:
            mask = mask.float()
        elif mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        mask = mask.expand(prediction.shape)
        if back is not None:
            mask = mask.permute(sorted(range(len(back)), key=back.__getitem__))
        strides = strided(shape, mask.stride())
        if strides is None:
            mask, strides = mask.contiguous(), (0, _NO_STRIDES)
    return Laid(back, shape, own, data, placed, mask, strides)


def _pass(call: LossCall, *, means: bool = False, gradient: bool = False) -> Made:
    laid, how = lay(call), call[-3:]
    device, rows = call.prediction.device, laid.rows_shape
    function, normalization, reduction = how

    def new(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    result = new(rows if reduction == "none" else ())
    row_means = new((2, *rows)) if means else None
    divisor = None if normalization == "none" else new(math.prod(rows) + 1 if normalization == "row" else 1)
    d = used = last = assumed = None
    if gradient:
        d, used = new(laid.shape, call.prediction.dtype), new(1)
        last = cell(device, _kind(laid, function, reduction))
        assumed = last.value
    launched = loss_launch(
        laid, *how, d, used=used, assumed=assumed, result=result, means=row_means, divisor=divisor
    )  # fmt: skip
    launch.loss(device, *launched)
    if laid.back is not None:
        result = result.permute(laid.back).contiguous() if reduction == "none" else result
        row_means = row_means if row_means is None else row_means.permute(0, *(1 + k for k in laid.back))
        d = d if d is None else d.permute(laid.back)
    return Made(result, row_means, divisor, None if d is None else (d, used, last))


def _kind(laid: Laid, function: str, reduction: str) -> tuple:
    """A key that tells a loss apart from others. It is a hint, see ``workspace.cell``."""
    types = (t.dtype if isinstance(t, Tensor) else type(t) for t in laid.data)
    tables = (c.column.data_ptr() for c in laid.coefficients if isinstance(c, Gathered))
    return (laid.shape, function, reduction, *types, *tables)


def _gradient(
    call: LossCall, upstream: Tensor, divisor: Tensor | None, written: tuple[Tensor, Tensor, Cell] | None
) -> Tensor:
    """The gradient of the prediction for ``upstream``; ``written``: see ``Made``."""
    laid, prediction = lay(call), call.prediction
    order = None if laid.back is None else sorted(range(len(laid.back)), key=laid.back.__getitem__)
    used = assumed = None
    if written is None:
        d = torch.empty(laid.shape, dtype=prediction.dtype, device=prediction.device)
    else:
        d, used, last = written
        d = d if order is None else d.permute(order)
        assumed = of_this_stream(last, prediction.device).value
    if call.reduction == "none" and order is not None:
        upstream = upstream.permute(order)
    upstream = upstream.to(torch.float32)
    launched = loss_launch(
        laid, *call[-3:], d, used=used, assumed=assumed, upstream=upstream, divisor=divisor
    )  # fmt: skip
    launch.loss(prediction.device, *launched)
    return d if laid.back is None else d.permute(laid.back)


def loss_launch(
    laid: Laid, function, normalization, reduction, gradient, *,
    used=None, assumed=None, upstream=None, result=None, means=None, divisor=None,
) -> tuple[tuple[int, int], tuple, tuple]:  # fmt: skip
    """The launch of a loss, of its gradient, or of both: (grid, arguments, constants)."""
    prediction, x0, n = laid.data
    weight, p, q, scale, c = laid.coefficients
    shape, device = laid.shape, prediction.device
    rows = arrange(shape, p, q, scale, weight, c, upstream, rows=laid.rows_shape)
    source, (kind, seed_kind, offset) = source_of(n, device)
    elements = prediction.numel()
    tile = tile_of(elements, prediction.element_size())
    how = plan(shape, laid.rows_shape, tile, kind in ("exact", "fast"), offset, True)
    columns, unit = how.constants[2:4]
    mask = mask_of(*laid.mask_strides, unit if columns % unit == 0 else 1)
    number = how.rows if how.parts > 1 else how.grid[0]
    counters = partials = None
    if result is not None:
        counters, partials = loss_workspace(device, how.rows, how.parts, number)
    size = 1.0 if reduction == "sum" else elements / how.rows
    mean = 1.0 / how.rows if reduction == "mean" else 1.0
    *pointers, up = rows.pointers
    return (
        how.grid,
        (
            *(prediction, x0, n if kind == "tensor" else None, gradient, laid.mask),
            *(*pointers, rows.index, source[0]),
            *(up, used, assumed, result, means, divisor, counters, partials),
            *(*source[1:], high := _float32(size), size - high, mean, mean / size),
            *(*mask.numbers, how.rows, how.parts, number),
            *(rows.steps, rows.stride, *how.numbers, how.sample_runs, how.channel_runs),
        ),
        (
            *(*rows.kinds, rows.index_kind, kind, seed_kind, offset, mask.dims, mask.together),
            *(function, normalization, reduction, 8 if launch.INTERPRETED else 128, how.parts > 1),
            *(*how.constants, launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )


def loss_workspace(device: torch.device, rows: int, parts: int, number: int) -> tuple[Tensor, Tensor]:
    """(counters, partial sums) of a launch that gives a loss."""
    space = workspace(device, 1 + rows, 4 * (rows * parts + number) + 2 * rows)
    return space.counters, space.partials
