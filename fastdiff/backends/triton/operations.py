"""The operations on a GPU: the arguments of the reference's, run by the kernels, and their gradients."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import modes
from ...codes import KEPT_STEPS, NEED_C
from ...tensors import Gathered, as_tensor, in_two_passes
from .. import reference
from ..layout import layout_of
from ..saving import save, saved
from . import launch, unfit_because
from .coefficients import arrange, is_one, shape_of
from .launch import launches
from .plan import mask_of, plan, strided, tile_of
from .workspace import Cell, cell, of_this_stream, workspace

__all__ = [
    "convert",
    "gather",
    "launches",
    "loss",
    "loss_gradient",
    "noise",
    "noise_and_target",
    "normal",
    "rational",
    "step",
    "uniform",
]

_TYPES = (Tensor, torch.nn.Parameter)
_DATA = (torch.float32, torch.bfloat16, torch.float16)
_UNIFORMS = _ROWS = 128  # a program
_NO_STRIDES = (1,) * 3 + (0,) * 4


def _runs_on(device: torch.device) -> bool:
    if device.type == "cuda" or device.type == "xpu":
        return not unfit_because(device)
    return launch.INTERPRETED and device.type == "cpu"


def _plain() -> bool:
    """Whether tensors are what their memory says: none is traced or transformed (``modes.wrapping``)."""
    return not torch.compiler.is_compiling() and modes.wrapping() is None


def _fits(*tensors: Any) -> bool:
    """Whether the kernels take these tensors (anything else among the arguments is passed over)."""
    for t in tensors:
        if isinstance(t, Tensor) and not (type(t) in _TYPES and t.dtype in _DATA):
            return False
    return True


def _rows_fit(*rows: Any) -> bool:
    """Whether the kernels take these coefficients: float32, in the computation's precision."""
    for row in rows:
        row = row.column if isinstance(row, Gathered) else row
        if isinstance(row, Tensor) and not (type(row) in _TYPES and row.dtype == torch.float32):
            return False
    return True


def _differentiable(*tensors: Any) -> bool:
    if not torch.is_grad_enabled():
        return False
    for t in tensors:
        t = t.column if isinstance(t, Gathered) else t
        if isinstance(t, Tensor) and t.requires_grad:
            return True
    return False


def tensors(*coefficients: Any) -> list[Any]:
    """``Gathered`` ones as tensors, for the reference."""
    return [as_tensor(c) for c in coefficients]


def _permuted(tensors: tuple, rows: tuple) -> tuple[tuple[int, ...] | None, list, list]:
    """(order, tensors, rows) with the tensors contiguous. Where the first is dense in another order of dimensions
    (channels_last, transposed) all are taken in that order, and ``order`` leads back; but noise that is made counts
    elements in the logical order, so then, and for what has gaps, it is a copy."""
    first = tensors[0]
    if not first.is_contiguous() and all(t is None or isinstance(t, Tensor) for t in tensors):
        order = sorted(range(first.ndim), key=lambda d: -first.stride(d))
        if first.permute(order).is_contiguous():
            back = tuple(sorted(range(first.ndim), key=order.__getitem__))
            rows = [
                Gathered(row.column, row.index.permute(order))
                if isinstance(row, Gathered)
                else row.permute(order)
                if isinstance(row, Tensor)
                else row
                for row in rows
            ]
            return back, [t if t is None else t.permute(order).contiguous() for t in tensors], rows
    return None, [t.contiguous() if isinstance(t, Tensor) else t for t in tensors], list(rows)


def _source(n: Any, device: torch.device) -> tuple[tuple, tuple]:
    """((seed, stream, sample_offset, strength), (kind, kind of seed, whether there is an offset)) of noise: a tensor,
    a ``fastdiff.ops.Philox`` or None."""
    if n is None or isinstance(n, Tensor):
        return (None, 0, 0, 0.0), ("none" if n is None else "tensor", "number", False)
    seed, kind = _seed(n.seed, device)
    return (seed, n.stream, n.sample_offset, float(n.offset)), (n.rng, kind, bool(n.offset))


def _seed(seed: int | Tensor, device: torch.device) -> tuple[int | Tensor, str]:
    if isinstance(seed, Tensor):
        if seed.device == device:
            return seed, "tensor"
        if seed.device.type != "cpu":
            return seed.to(device), "tensor"
    seed = int(seed)
    return seed - 2**64 if seed >= 2**63 else seed, "number"


def affine_launch(
    shape: tuple[int, ...], device: torch.device, u: Tensor | None, a: Any, v: Any, b: Any,
    out: Tensor | None, kept: Tensor | None = None, gamma: float = 0.0, xi: Any = None,
    target: Tensor | None = None, p: Any = None, q: Any = None,
) -> tuple[tuple[int, int], tuple, tuple]:  # fmt: skip
    """The launch of out = a u + b (v + gamma xi), kept = v, target = p u + q v: (grid, arguments, constants). Tensors
    are contiguous; v and xi may be a ``Philox``."""
    rows = arrange(shape, a, b, p, q)
    (seed, stream, sample_offset, strength), (kind, seed_kind, offset) = _source(v, device)
    (xi_seed, xi_stream, xi_offset, xi_strength), (xi_kind, xi_seed_kind, xi_has_offset) = _source(xi, device)
    made = kind in ("exact", "fast") or xi_kind in ("exact", "fast")
    written = out if out is not None else kept
    tile = tile_of(written.numel(), written.element_size())
    how = plan(shape, rows.shape, tile, made, offset or xi_has_offset)
    return (
        how.grid,
        (
            *(out, kept, target, u, v if kind == "tensor" else None, xi if xi_kind == "tensor" else None),
            *(*rows.pointers, rows.index, seed, xi_seed),
            *(stream, sample_offset, strength, xi_stream, xi_offset, xi_strength, gamma),
            *(rows.steps, rows.stride, *how.numbers, how.sample_runs, how.channel_runs),
        ),
        (
            *(*rows.kinds, rows.index_kind, kind, seed_kind, offset, xi_kind, xi_seed_kind, xi_has_offset),
            *(*how.constants, launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )


def _affine(shape: tuple[int, ...], device: torch.device, *operands: Any) -> None:
    """Launches it: see ``affine_launch``."""
    launch.affine(device, *affine_launch(shape, device, *operands))


def uniform(seed: int | Tensor, samples: int, stream: int, sample_offset: int = 0, device: Any = None) -> Tensor:
    """As ``reference.uniform``."""
    where = _device(device, seed)
    if not _plain() or not _runs_on(where):
        return reference.uniform(seed, samples, stream, sample_offset, device)
    u = torch.empty(samples, dtype=torch.float64, device=where)
    if samples:
        launch.uniforms(where, *uniforms_launch(u, *_seed(seed, where), stream, sample_offset, 0))
    return u


def uniforms_launch(
    out: Tensor, seed: int | Tensor, kind: str, stream: int, sample_offset: int, steps: int
) -> tuple[tuple[int, int], tuple, tuple]:
    """The launch of a uniform u in (0, 1) a sample; for ``steps`` > 0 of the timestep floor(steps u)."""
    samples = out.numel()
    arguments = (out, seed, stream, sample_offset, samples, steps)
    return (-(-samples // _UNIFORMS), 1), arguments, (kind, steps > 0, _UNIFORMS)


def normal(
    seed: int | Tensor,
    shape: tuple[int, ...],
    stream: int = 0,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    rng: str = "exact",
) -> Tensor:
    """As ``reference.normal``; ``rng`` as in ``fastdiff.ops.Philox``."""
    where = _device(device, seed)
    if not _plain() or not _runs_on(where) or dtype not in _DATA:
        return reference.normal(seed, shape, stream, sample_offset, dtype, device)
    z = torch.empty(shape, dtype=dtype, device=where)
    if z.numel():
        _affine(tuple(shape), where, None, None, Seeded(seed, stream, sample_offset, 0.0, rng), None, None, z)
    return z


class Seeded(NamedTuple):
    """Noise that a kernel makes: what it asks of a ``fastdiff.ops.Philox``, known to be right."""

    seed: int | Tensor
    stream: int
    sample_offset: int
    offset: float
    rng: str


def _device(device: Any, seed: Any) -> torch.device:
    if device is None:
        return seed.device if isinstance(seed, Tensor) else torch.get_default_device()
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, n, alpha, sigma, perturbation, xi, keep_noise):
        save(ctx, alpha, sigma)
        ctx.dtypes = x0.dtype, n.dtype if isinstance(n, Tensor) else None
        x_t, kept, _ = _noise(x0, n, alpha, sigma, perturbation, xi, keep_noise)
        if kept is not n and isinstance(kept, Tensor):
            ctx.mark_non_differentiable(kept)
        return x_t, kept

    @staticmethod
    def backward(ctx, gradient, _):
        needed = ctx.needs_input_grad[:2]
        return (*_scaled(gradient, zip(saved(ctx), ctx.dtypes, needed)), None, None, None, None, None)


def _scaled(gradient: Tensor, wanted: Any) -> list[Tensor | None]:
    """row * gradient, rounded once, for each (row, dtype, whether it is wanted)."""
    results: list[Tensor | None] = []
    for row, dtype, needed in wanted:
        if not needed:
            results.append(None)
        elif (
            _differentiable(gradient)
            or not _fits(gradient)
            or not gradient.numel()
            or not _plain()
            or modes.is_many(gradient)
        ):
            results.append((tensors(row)[0] * gradient.to(torch.float32)).to(dtype))
        else:
            out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
            _affine(tuple(out.shape), out.device, gradient.contiguous(), row, None, None, out)
            results.append(out)
    return results


def gather(table: Tensor, t: Tensor, check: Callable[[Tensor], None]) -> Sequence[Gathered]:
    """As ``reference.gather``, but it is the kernels that gather."""
    if not _runs_on(t.device):
        return reference.gather(table, t, check)
    check(t)
    index = t.long()
    return [Gathered(column, index) for column in table.unbind(1)]


def rational(fractions: Tensor, t: Tensor) -> Sequence[Tensor] | None:
    """Rows (a + b t) / (1 + d t) of times t, float32 in the shape of t, one for each column of ``fractions``
    [3, columns], float64; None where they are to be computed otherwise."""
    usable = _plain() and type(t) in _TYPES and t.dtype in (torch.float32, torch.float64) and _runs_on(t.device)
    if not usable or not t.numel() or not t.is_contiguous() or _differentiable(t):
        return None
    columns, samples = fractions.shape[1], t.numel()
    rows = torch.empty((columns, *t.shape), dtype=torch.float32, device=t.device)
    launch.rational(t.device, (-(-samples // _ROWS), 1), (rows, t, fractions, samples), (columns, _ROWS))
    return rows.unbind(0)


def noise(
    x0: Tensor, n: Any, alpha: Any, sigma: Any, perturbation: float, xi: Any, keep_noise: bool
) -> tuple[Tensor, Any]:
    """As ``reference.noise``; alpha and sigma may be ``Gathered``."""
    arguments = (x0, n, alpha, sigma, perturbation, xi, keep_noise)
    if (
        not (_plain() and _runs_on(x0.device) and _fits(x0, n, xi) and _rows_fit(alpha, sigma))
        or not x0.numel()
        or _differentiable(alpha, sigma, xi)
    ):
        return reference.noise(x0, n, *tensors(alpha, sigma), perturbation, xi, keep_noise)
    if not _differentiable(x0, n):
        return _noise(*arguments)[:2]
    x_t, kept = _Noise.apply(*arguments)
    return x_t, n if isinstance(n, Tensor) else kept


def noise_and_target(
    x0: Tensor, n: Any, alpha: Any, sigma: Any, perturbation: float, xi: Any, keep_noise: bool, p: Any, q: Any
) -> tuple[Tensor, Any, Tensor]:
    """``noise`` and, from the same launch, the target p x0 + q n, in the dtype of x0. A p or q that is None leaves its
    term out. What needs a gradient, and what the reference does, is two passes."""
    if (
        not (_plain() and _runs_on(x0.device) and _fits(x0, n, xi) and _rows_fit(alpha, sigma, p, q))
        or not x0.numel()
        or _differentiable(x0, n, alpha, sigma, xi, p, q)
    ):
        return in_two_passes(noise, x0, n, alpha, sigma, perturbation, xi, keep_noise, p, q)
    return _noise(x0, n, alpha, sigma, perturbation, xi, keep_noise, True, p, q)


def _noise(x0, n, alpha, sigma, perturbation, xi, keep_noise, with_target=False, p=None, q=None):
    shape, device = tuple(x0.shape), x0.device
    order, (data, given, other), (alpha, sigma, p, q) = _permuted((x0, n, xi), (alpha, sigma, p, q))
    x_t, target = torch.empty_like(data), torch.empty_like(data) if with_target else None
    kept, z = n, None
    if keep_noise and not isinstance(n, Tensor):
        kept = z = torch.empty(shape, dtype=torch.float32, device=device)
    _affine(
        tuple(data.shape), device, data, alpha, given, sigma, x_t, z, float(perturbation), other, target, p, q
    )  # fmt: skip
    if order is not None:
        return x_t.permute(order), kept, target if target is None else target.permute(order)
    return _like(x_t, x0), kept, target if target is None else _like(target, x0)


class _Loss(torch.autograd.Function):
    """The loss. Its gradient is written in the same pass where it can be: for the upstream gradient that came last time
    to this loss (1 at first), so that a loss that is divided or scaled alike each time costs nothing more. Backward
    compares on the device, and computes the gradient again for one that is another."""

    @staticmethod
    def forward(ctx, prediction, weight, x0, n, p, q, scale, c, mask, function, normalization, reduction):
        values = (prediction, weight, x0, n, p, q, scale, c, mask)
        save(ctx, *values)
        ctx.how = function, normalization, reduction
        # A float16 loss is scaled; the size of its gradient is known only in the backward, as is a mask's sum.
        ahead = (
            ctx.needs_input_grad[0]
            and reduction != "none"
            and normalization == "none"
            and prediction.dtype != torch.float16
        )
        result, ctx.means, ctx.divisor, ctx.gradient, ctx.cell = _loss(
            *values, *ctx.how, means=ctx.needs_input_grad[1], gradient=ahead
        )
        return result

    @staticmethod
    def backward(ctx, upstream):
        prediction, weight, x0, n, p, q, scale, c, mask = saved(ctx)
        function, normalization, reduction = ctx.how
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            inputs = [t for t, needed in zip((prediction, weight), ctx.needs_input_grad) if needed]
            p, q, scale, w, c = tensors(p, q, scale, weight, c)
            loss = reference.loss(prediction, x0, n, p, q, scale, w, c, mask, *ctx.how)
            found = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
            gradients = [next(found) if needed else None for needed in ctx.needs_input_grad[:2]]
            return (*gradients, *(None,) * 10)
        d_prediction = d_weight = None
        if ctx.needs_input_grad[0] and modes.is_many(upstream):
            rows = tensors(p, q, scale, weight, c)
            d_prediction = reference.loss_gradient(upstream, prediction, x0, n, *rows, mask, *ctx.how)
        elif ctx.needs_input_grad[0]:
            # What was written ahead is given away once; whoever gets it may add to it.
            written, ctx.gradient = ctx.gradient, None
            last, ctx.cell = ctx.cell, None
            d_prediction = _loss_gradient(
                prediction, weight, x0, n, p, q, scale, c, mask, *ctx.how, upstream, ctx.divisor, written, last
            )
        if ctx.needs_input_grad[1]:
            count = reference.rows_of_mean(prediction, weight, mask, normalization) if reduction == "mean" else 1
            d_weight = (upstream.double() * ctx.means.double().sum(0) / count).to(weight.dtype)
        return (d_prediction, d_weight, *(None,) * 10)


def loss(
    prediction: Tensor,
    x0: Tensor | None,
    n: Any,
    p: Any,
    q: Any,
    scale: Any,
    weight: Any,
    c: Any,
    mask: Tensor | None,
    function: str,
    mask_normalization: str,
    reduction: str,
) -> Tensor:
    """As ``reference.loss``; the coefficients may be ``Gathered``."""
    if p is None or x0 is None:
        p = x0 = None
    if q is None or n is None:
        q = n = None
    if function not in NEED_C:
        c = None
    own = shape_of(weight)
    if (
        not (_plain() and _runs_on(prediction.device) and _fits(prediction, x0, n))
        or not _rows_fit(p, q, scale, weight, c)
        or not prediction.numel()
        or _differentiable(x0, n, p, q, scale, c, mask)
        or (isinstance(weight, Gathered) and _differentiable(weight))
        or not _own_rows(tuple(prediction.shape), own, p, q, scale, c)
        or not (mask is None or (type(mask) in _TYPES and mask.dtype in launch.POINTERS))
    ):
        p, q, scale, weight, c = tensors(p, q, scale, weight, c)
        return reference.loss(prediction, x0, n, p, q, scale, weight, c, mask, function, mask_normalization, reduction)
    if mask is None:
        mask_normalization = "none"
    values = (prediction, weight, x0, n, p, q, scale, c, mask, function, mask_normalization, reduction)
    if _differentiable(prediction, weight):
        return _Loss.apply(*values)
    return _loss(*values)[0]


def loss_gradient(upstream: Tensor, prediction: Tensor, x0: Any, n: Any, *arguments: Any) -> Tensor:
    """As ``reference.loss_gradient``."""
    *coefficients, mask, function, mask_normalization, reduction = arguments
    p, q, scale, weight, c = coefficients
    if (
        not (_plain() and _runs_on(prediction.device) and _fits(prediction, x0, n) and _rows_fit(*coefficients))
        or not prediction.numel()
        or not _own_rows(tuple(prediction.shape), shape_of(weight), p, q, scale, c)
        or not (mask is None or (type(mask) in _TYPES and mask.dtype in launch.POINTERS))
    ):
        return reference.loss_gradient(upstream, prediction, x0, n, *tensors(*coefficients), *arguments[5:])
    how = function, mask_normalization if mask is not None else "none", reduction
    values = (prediction, weight, x0, n, p, q, scale, c, mask)
    divisor = None if how[1] == "none" else _loss(*values, *how)[2]
    return _loss_gradient(*values, *how, upstream, divisor)


def _own_rows(shape: tuple[int, ...], own: tuple[int, ...], *others: Any) -> bool:
    """Whether the rows of the weight are those of a layout, and the others' too, so that there is one sum for each."""
    for other in others:
        rows = shape_of(other)
        if rows and rows != own:
            spread = other.index if isinstance(other, Gathered) else other
            if not is_one(spread):
                return False
    return layout_of(shape, own)[1] == own


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


class _Laid(NamedTuple):
    """The operands of a loss, laid out for the kernel. ``back`` leads from its order of dimensions to the caller's."""

    back: tuple[int, ...] | None
    shape: tuple[int, ...]
    rows_shape: tuple[int, ...]
    data: list
    coefficients: list
    mask: Tensor | None
    mask_strides: tuple[int, tuple[int, ...]]  # see ``plan.strided``; -1 dimensions where there is no mask


def _lay(prediction, weight, x0, n, p, q, scale, c, mask) -> _Laid:
    coefficients = (weight, p, q, scale, c)
    own, shape = shape_of(weight), tuple(prediction.shape)
    back, data, placed = _permuted((prediction, x0, n), coefficients)
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
    return _Laid(back, shape, own, data, placed, mask, strides)


def _loss(
    prediction, weight, x0, n, p, q, scale, c, mask, function, normalization, reduction, *, means=False, gradient=False
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None, Cell | None]:
    """(result, means of the rows or None, what gradients are multiplied by where the mask's sum divides, (gradient, the
    upstream one it is for) or None, the cell which that came from)"""
    laid = _lay(prediction, weight, x0, n, p, q, scale, c, mask)
    device, rows = prediction.device, laid.rows_shape

    def new(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    result = new(rows if reduction == "none" else ())
    row_means = new((2, *rows)) if means else None  # pairs
    divisor = None if normalization == "none" else new(math.prod(rows) + 1 if normalization == "row" else 1)
    d = used = last = assumed = None
    if gradient:
        d, used = new(laid.shape, prediction.dtype), new(1)
        last = cell(device, _kind(laid, function, reduction))
        assumed = last.value
    _launch_loss(
        laid, function, normalization, reduction, d, used=used, assumed=assumed, result=result, means=row_means,
        divisor=divisor,
    )  # fmt: skip
    if laid.back is not None:
        result = result.permute(laid.back).contiguous() if reduction == "none" else result
        row_means = row_means if row_means is None else row_means.permute(0, *(1 + k for k in laid.back))
        d = d if d is None else d.permute(laid.back)
    return result, row_means, divisor, None if d is None or used is None else (d, used), last


def _kind(laid: _Laid, function: str, reduction: str) -> tuple:
    """What tells a loss from others: a hint, see ``workspace.cell``."""
    types = (t.dtype if isinstance(t, Tensor) else type(t) for t in laid.data)
    tables = (c.column.data_ptr() for c in laid.coefficients if isinstance(c, Gathered))
    return (laid.shape, function, reduction, *types, *tables)


def _loss_gradient(
    prediction, weight, x0, n, p, q, scale, c, mask, function, normalization, reduction, upstream, divisor,
    written=None, last=None,
) -> Tensor:  # fmt: skip
    """The gradient of the prediction for ``upstream``; ``written``: (one that is there, for which upstream one), which
    came from the cell ``last``."""
    laid = _lay(prediction, weight, x0, n, p, q, scale, c, mask)
    order = None if laid.back is None else sorted(range(len(laid.back)), key=laid.back.__getitem__)
    used = assumed = None
    if written is None:
        d = torch.empty(laid.shape, dtype=prediction.dtype, device=prediction.device)
    else:
        d, used = written
        d = d if order is None else d.permute(order)
        assumed = of_this_stream(last, prediction.device).value
    if reduction == "none" and order is not None:
        upstream = upstream.permute(order)
    upstream = upstream.to(torch.float32)
    _launch_loss(
        laid, function, normalization, reduction, d, used=used, assumed=assumed, upstream=upstream, divisor=divisor
    )
    return d if laid.back is None else d.permute(laid.back)


def _launch_loss(laid: _Laid, *operands: Any, **more: Any) -> None:
    """Launches it: see ``loss_launch``."""
    launch.loss(laid.data[0].device, *loss_launch(laid, *operands, **more))


def loss_launch(
    laid: _Laid, function, normalization, reduction, gradient, *,
    used=None, assumed=None, upstream=None, result=None, means=None, divisor=None,
) -> tuple[tuple[int, int], tuple, tuple]:  # fmt: skip
    """The launch of a loss, of its gradient, or of both: (grid, arguments, constants)."""
    prediction, x0, n = laid.data
    weight, p, q, scale, c = laid.coefficients
    shape, device = laid.shape, prediction.device
    rows = arrange(shape, p, q, scale, weight, c, upstream, rows=laid.rows_shape)
    source, (kind, seed_kind, offset) = _source(n, device)
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


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, m, x_t, k_x, k_m):
        ctx.rows = k_m, k_x
        ctx.dtypes = m.dtype, x_t.dtype
        return _convert(m, x_t, k_x, k_m)

    @staticmethod
    def backward(ctx, gradient):
        return (*_scaled(gradient, zip(ctx.rows, ctx.dtypes, ctx.needs_input_grad[:2])), None, None)


def convert(m: Tensor, x_t: Tensor, k_x: Any, k_m: Any, dtype: torch.dtype) -> Tensor:
    """As ``reference.convert``; k_x and k_m may be ``Gathered``."""
    if (
        not (_plain() and _runs_on(m.device) and _fits(m, x_t) and _rows_fit(k_x, k_m))
        or not m.numel()
        or _differentiable(k_x, k_m)
        or dtype != m.dtype
    ):
        return reference.convert(m, x_t, *tensors(k_x, k_m), dtype)
    return (_Convert.apply if _differentiable(m, x_t) else _convert)(m, x_t, k_x, k_m)


def _convert(m, x_t, k_x, k_m):
    back, (model, state), (k_x, k_m) = _permuted((m, x_t), (k_x, k_m))
    out = torch.empty_like(model)
    _affine(tuple(model.shape), m.device, state, k_x, model, k_m, out)
    return out if back is None else out.permute(back)


def step(
    x: Tensor,
    m: Tensor,
    uncond: Tensor | None,
    guidance: Tensor | float,
    row: Tensor,
    clip: float | None,
    history: tuple[Tensor, ...],
    noise: Any,
    log_variance: Tensor | None,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
    *,
    model_input: Tensor | None = None,
    **extras: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``reference.step``, which does what is masked or thresholded (``extras``)."""
    full = (x, m, uncond, *history, noise, log_variance)
    seen, extras = model_input, extras | {"model_input": model_input}
    if (
        not (_plain() and _runs_on(x.device) and _fits(*full) and _rows_fit(row, guidance))
        or not x.numel()
        or _differentiable(*full, guidance, row)
        or dtype != x.dtype
        or any(value is not None for name, value in extras.items() if name != "model_input")
        or not (seen is None or (x.is_contiguous() and seen.is_contiguous() and seen.dtype in _DATA))
    ):
        return reference.step(x, m, uncond, guidance, row, clip, history, noise, log_variance, dtype, wanted, **extras)
    shape, device = tuple(x.shape), x.device
    scale = guidance if isinstance(guidance, Tensor) and uncond is not None else None
    rows = (shape[0],) + (1,) * (x.ndim - 1)
    if scale is not None and not is_one(scale) and tuple(scale.shape) != rows:
        # Guidance by frame or token: rows of the table for each of those are for the reference.
        return reference.step(x, m, uncond, guidance, row, clip, history, noise, log_variance, dtype, wanted, **extras)
    each = row.ndim > 1 or (scale is not None and not is_one(scale))
    operands = (x, m, uncond, *history, *(None,) * (KEPT_STEPS - len(history)), noise, log_variance)
    free = not each or x.stride(0) == max(x.stride())  # samples stay the first dimension
    back, operands, _ = _permuted(operands, ()) if free else _plain_order(operands)
    data = operands[0]
    y = torch.empty_like(data)
    x0 = torch.empty_like(data) if wanted[0] else None
    entry = torch.empty_like(data, dtype=torch.float32) if wanted[1] else None
    source, (kind, seed_kind, offset) = _source(noise, device)
    tile = tile_of(data.numel(), data.element_size())
    laid = (data.shape[0],) + (1,) * (data.ndim - 1) if each else (1,) * data.ndim
    how = plan(tuple(data.shape), laid, tile, kind in ("exact", "fast"), offset)
    guided = "none" if uncond is None else "number" if scale is None else "one" if is_one(scale) else "row"
    launch.step(
        device,
        how.grid,
        (
            *(y, x0, entry, seen, *operands[:7], operands[7] if kind == "tensor" else None, operands[8]),
            *(row.contiguous(), scale if scale is None or guided == "one" else scale.contiguous(), *source),
            *(float(guidance) if guided == "number" else 1.0, 0.0 if clip is None else float(clip)),
            *(row.shape[-1] if row.ndim > 1 else 0, x.numel(), *how.numbers, how.sample_runs, how.channel_runs),
        ),
        (
            *(guided, kind, seed_kind, offset, clip is not None, seen is not None and len(seen) > len(x)),
            *(*how.constants, launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )
    if back is not None:
        return y.permute(back), x0 if x0 is None else x0.permute(back), entry if entry is None else entry.permute(back)
    return _like(y, x), x0 if x0 is None else _like(x0, x), entry if entry is None else _like(entry, x)


def _plain_order(tensors: tuple) -> tuple[None, list, list]:
    return None, [t.contiguous() if isinstance(t, Tensor) else t for t in tensors], []


def _like(result: Tensor, tensor: Tensor) -> Tensor:
    """``result`` in the memory format of ``tensor``: a channels_last network gets a channels_last x_t."""
    return result if tensor.is_contiguous() else torch.empty_like(tensor, dtype=result.dtype).copy_(result)
