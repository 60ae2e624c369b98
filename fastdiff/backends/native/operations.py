"""The operations on the CPU: the arguments of the reference's, run by ``fastdiff._C``, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import modes
from ...codes import DATA, DTYPES
from ...torch_access import _C
from .. import reference
from ..saving import save, saved
from .launch import FUNCTIONS, NORMALIZATIONS, REDUCTIONS, arrange, fits, masked, memory, source

available = _C is not None


def description() -> str:
    """What runs, for ``fastdiff doctor``."""
    return f"C++, {_C.simd()} of {', '.join(_C.simd_variants())}"


_Parameter = torch.nn.Parameter
_is_compiling, _wrapping = torch.compiler.is_compiling, modes.wrapping


def _plain(*tensors: Any) -> bool:
    """Whether all tensors are what their memory says: none is traced, transformed (``modes.wrapping``) or a
    subclass."""
    if _is_compiling() or _wrapping() is not None:
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is _Parameter:
            if not tensor.is_cpu or tensor.dtype not in DTYPES:
                return False
        elif isinstance(tensor, Tensor):
            return False
    return True


def _on_cpu(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"


def _differentiable(*tensors: Any) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return True
    return False


def _contiguous(tensor: Any) -> Any:
    return tensor.contiguous() if isinstance(tensor, Tensor) else tensor


def _empty(shape: torch.Size, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A contiguous tensor to write to; ``like`` is on the CPU, and saves time if it is just so."""
    if dtype == like.dtype and like.is_contiguous() and shape == like.shape:
        return torch.empty_like(like)
    return like.new_empty(shape, dtype=dtype)


def _like(result: Tensor, tensor: Tensor) -> Tensor:
    """``result`` in the memory format of ``tensor``: a channels_last network gets a channels_last x_t."""
    return result if tensor.is_contiguous() else torch.empty_like(tensor, dtype=result.dtype).copy_(result)


def gather(table: Tensor, t: Tensor, check: Callable[[Tensor], None]) -> Sequence[Tensor]:
    """As ``reference.gather``."""
    if _plain(table, t) and t.dtype == torch.int64:
        height, width = table.shape
        held, rows = t.contiguous(), table.new_empty((width, *t.shape))
        if _C.gather(memory(table), height, width, memory(held), memory(rows)) < 0:
            return rows.unbind(0)
    return reference.gather(table, t, check)


def uniform(seed: int | Tensor, samples: int, stream: int, sample_offset: int = 0, device: Any = None) -> Tensor:
    """As ``reference.uniform``."""
    if not _plain(seed) or not _on_cpu(device):
        return reference.uniform(seed, samples, stream, sample_offset, device)
    u = torch.empty(samples, dtype=torch.float64, device="cpu")
    _C.uniform(int(seed), stream, sample_offset, memory(u), samples)
    return u


def normal(
    seed: int | Tensor,
    shape: tuple[int, ...],
    stream: int = 0,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> Tensor:
    """As ``reference.normal``."""
    if not _plain(seed) or not _on_cpu(device) or dtype not in DATA:
        return reference.normal(seed, shape, stream, sample_offset, dtype, device)
    z = torch.empty(shape, dtype=dtype, device="cpu")
    layout, _ = arrange(z.shape)
    _C.normal(layout, (int(seed), stream, sample_offset, 0.0), memory(z), torch.get_num_threads())
    return z


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, n, alpha, sigma, perturbation, xi, keep_noise):
        save(ctx, alpha, sigma)
        ctx.dtypes = x0.dtype, n.dtype if isinstance(n, Tensor) else None
        x_t, kept = _noise(x0, n, alpha, sigma, perturbation, xi, keep_noise)
        if kept is not n and isinstance(kept, Tensor):
            ctx.mark_non_differentiable(kept)
        return x_t, kept

    @staticmethod
    def backward(ctx, gradient, _):
        alpha, sigma = saved(ctx)
        wide = gradient.to(alpha.dtype)
        d_x0 = (alpha * wide).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        d_n = (sigma * wide).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return d_x0, d_n, None, None, None, None, None


def noise(
    x0: Tensor, n: Any, alpha: Tensor, sigma: Tensor, perturbation: float, xi: Any, keep_noise: bool
) -> tuple[Tensor, Any]:
    """As ``reference.noise``."""
    arguments = (x0, n, alpha, sigma, perturbation, xi, keep_noise)
    seed = getattr(n, "seed", None)
    if not _plain(x0, n, seed, alpha, sigma, xi) or _differentiable(alpha, sigma, xi):
        return reference.noise(*arguments)
    if not _differentiable(x0, n):
        return _noise(*arguments)
    x_t, kept = _Noise.apply(*arguments)
    return x_t, n if isinstance(n, Tensor) else kept


def _noise(x0, n, alpha, sigma, perturbation, xi, keep_noise):
    shape = x0.shape
    layout, (a, s) = arrange(shape, alpha, sigma)
    x_t = _empty(shape, x0.dtype, x0)
    kept = n
    if keep_noise and not isinstance(n, Tensor):
        kept = _empty(shape, alpha.dtype, x0)
    data, given, xi = _contiguous(x0), _contiguous(n), _contiguous(xi)
    _C.noise(
        layout,
        memory(data),
        memory(a),
        memory(s),
        source(given),
        float(perturbation),
        source(xi),
        memory(x_t),
        None if kept is n else memory(kept),
        torch.get_num_threads(),
    )
    return _like(x_t, x0), kept


class _Loss(torch.autograd.Function):
    """The loss; its gradient is written in the same pass, as for an upstream gradient of 1, and given out if that is
    what comes. Otherwise it is computed again with the one that came: the upstream factor is in before any rounding."""

    @staticmethod
    def forward(ctx, prediction, weight, rest):
        *tensors, ctx.function, ctx.normalization, ctx.reduction = rest
        save(ctx, prediction, weight, *tensors)
        for_prediction, for_weight, _ = ctx.needs_input_grad
        # A float16 loss is scaled; its gradient for 1 would be of no use.
        ahead = for_prediction and ctx.reduction != "none" and prediction.dtype != torch.float16
        result, ctx.means, ctx.gradient = _launch_loss(prediction, weight, *rest, means=for_weight, gradient=ahead)
        return result

    @staticmethod
    def backward(ctx, upstream):
        for_prediction, for_weight, _ = ctx.needs_input_grad
        graph = torch.is_grad_enabled()  # of the gradient
        plain = not modes.is_many(upstream)
        if ctx.gradient is not None and not for_weight and not graph and plain and float(upstream) == 1.0:
            gradient, ctx.gradient = ctx.gradient, None
            return gradient, None, None
        prediction, weight, *tensors = saved(ctx)
        rest = (*tensors, ctx.function, ctx.normalization, ctx.reduction)
        if graph:
            inputs = [t for t, needed in ((prediction, for_prediction), (weight, for_weight)) if needed]
            loss = reference.loss(prediction, *rest[:5], weight, *rest[5:])
            found = iter(torch.autograd.grad(loss, inputs, upstream, create_graph=True))
            return next(found) if for_prediction else None, next(found) if for_weight else None, None
        d_prediction = d_weight = None
        if for_prediction and not plain:  # several at once
            d_prediction = reference.loss_gradient(upstream, prediction, *rest[:5], weight, *rest[5:])
        elif for_prediction:
            d_prediction, ctx.gradient = ctx.gradient, None
            if d_prediction is None or upstream.numel() != 1 or float(upstream) != 1.0:
                _, _, d_prediction = _launch_loss(
                    prediction, weight, *rest, upstream=upstream, result=False, gradient=True
                )
        if for_weight:
            mean = ctx.reduction == "mean"
            count = reference.rows_of_mean(prediction, weight, tensors[-1], ctx.normalization) if mean else 1
            d_weight = (upstream * ctx.means / count).to(weight.dtype)
        return d_prediction, d_weight, None


def loss(
    prediction: Tensor,
    x0: Tensor | None,
    n: Any,
    p: Tensor | None,
    q: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    c: Tensor | None,
    mask: Tensor | None,
    function: str,
    mask_normalization: str,
    reduction: str,
) -> Tensor:
    """As ``reference.loss``."""
    rest = (x0, n, p, q, scale, c, mask, function, mask_normalization, reduction)
    seed = getattr(n, "seed", None)
    if (
        not _plain(prediction, weight, *rest[:7], seed)
        or _differentiable(x0, n, p, q, scale, c, mask)
        or not fits(prediction.shape, weight, p, q, scale, c)
    ):
        return reference.loss(prediction, x0, n, p, q, scale, weight, *rest[5:])
    if _differentiable(prediction, weight):
        return _Loss.apply(prediction, weight, rest)
    return _launch_loss(prediction, weight, *rest)[0]


def loss_gradient(upstream: Tensor, prediction: Tensor, x0: Any, n: Any, *arguments: Any) -> Tensor:
    """As ``reference.loss_gradient``."""
    p, q, scale, weight, c, mask, *how = arguments
    if not _plain(upstream, prediction, x0, n, *arguments) or not fits(prediction.shape, weight, p, q, scale, c):
        return reference.loss_gradient(upstream, prediction, x0, n, *arguments)
    rest = (x0, n, p, q, scale, c, mask, *how)
    return _launch_loss(prediction, weight, *rest, upstream=upstream, result=False, gradient=True)[2]


def _launch_loss(
    prediction, weight, x0, n, p, q, scale, c, mask, function, normalization, reduction,
    *, upstream=None, result=True, means=False, gradient=False,
):  # fmt: skip
    """(result or None, means of the rows or None, gradient or None)."""
    dtype, shape = weight.dtype, prediction.shape
    if reduction == "none" and upstream is not None:
        layout, (w, p_, q_, scale_, c_, up) = arrange(shape, weight, p, q, scale, c, upstream.to(dtype))
    else:
        layout, (w, p_, q_, scale_, c_) = arrange(shape, weight, p, q, scale, c)
        up = upstream if upstream is None or upstream.dtype == dtype else upstream.to(dtype)
    rows = weight.shape
    value = weight.new_empty(rows if reduction == "none" else ()) if result else None
    row_means = weight.new_empty(rows, dtype=torch.float64) if means else None
    d = _empty(shape, prediction.dtype, prediction) if gradient else None
    # Whatever is pointed at must be held until the call returns.
    m, x0, n = _contiguous(prediction), _contiguous(x0), _contiguous(n)
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
        FUNCTIONS[function],
        NORMALIZATIONS[normalization],
        REDUCTIONS[reduction],
        memory(up),
        memory(value),
        memory(row_means),
        memory(d),
        torch.get_num_threads(),
    )
    return value, row_means, d


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, m, x_t, k_x, k_m):
        save(ctx, k_x, k_m)
        ctx.dtypes = m.dtype, x_t.dtype
        return _convert(m, x_t, k_x, k_m)

    @staticmethod
    def backward(ctx, gradient):
        k_x, k_m = saved(ctx)
        wide = gradient.to(k_m.dtype)
        d_m = (k_m * wide).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        d_x = (k_x * wide).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return d_m, d_x, None, None


def convert(m: Tensor, x_t: Tensor, k_x: Tensor, k_m: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``reference.convert``."""
    if not _plain(m, x_t, k_x, k_m) or _differentiable(k_x, k_m) or dtype != m.dtype:
        return reference.convert(m, x_t, k_x, k_m, dtype)
    return (_Convert.apply if _differentiable(m, x_t) else _convert)(m, x_t, k_x, k_m)


def _convert(m, x_t, k_x, k_m):
    layout, (k_x, k_m) = arrange(m.shape, k_x, k_m)
    out = _empty(m.shape, m.dtype, m)
    data, x = _contiguous(m), _contiguous(x_t)
    _C.convert(layout, memory(data), memory(x), memory(k_x), memory(k_m), memory(out), torch.get_num_threads())
    return _like(out, m)


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
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Any = None,
    model_input: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``reference.step``."""
    tensors = (x, m, uncond, guidance, row, *history, noise, log_variance, threshold, mask, known, known_noise)
    seeds = getattr(noise, "seed", None), getattr(known_noise, "seed", None)
    held_input = model_input is None or model_input.is_contiguous()
    if (
        not (_plain(*tensors, *seeds, model_input) and held_input and len(row.shape) <= 2)
        or _differentiable(*tensors)
        or dtype != x.dtype
    ):
        return reference.step(
            x, m, uncond, guidance, row, clip, history, noise, log_variance, dtype, wanted, threshold=threshold,
            mask=mask, known=known, known_noise=known_noise, model_input=model_input,
        )  # fmt: skip
    per_sample = row.new_empty(1).expand((len(x),) + (1,) * (x.ndim - 1)) if row.ndim > 1 else None
    scale = None
    if uncond is not None:
        scale = guidance if isinstance(guidance, Tensor) else row.new_full((1,), guidance)
    layout, (_, scale, threshold) = arrange(x.shape, per_sample, scale, threshold)
    y = _empty(x.shape, dtype, x)
    x0 = _empty(x.shape, dtype, x) if wanted[0] else None
    entry = _empty(x.shape, row.dtype, x) if wanted[1] else None
    held = [_contiguous(t) for t in (x, m, uncond, row, noise, log_variance, known, known_noise)]
    entries = [_contiguous(t) for t in history]
    _C.step(
        layout,
        memory(held[0]),
        memory(held[1]),
        memory(held[2]),
        memory(scale),
        memory(held[3]),
        clip,
        tuple(memory(t) for t in entries),
        source(held[4]),
        memory(held[5]),
        memory(y),
        memory(x0),
        memory(entry),
        memory(threshold),
        masked(mask, x.shape),
        memory(held[6]),
        source(held[7]),
        memory(model_input),
        torch.get_num_threads(),
    )
    return _like(y, x), x0 if x0 is None else _like(x0, x), entry if entry is None else _like(entry, x)
