"""The operations in plain PyTorch: the arithmetic that every backend must equal. Autograd differentiates them.

Arguments are checked already (``fastdiff.ops``). Rows are broadcastable to the full-size tensors and in the compute
dtype: float32, or float64 where a full-size input is float64. Results are rounded once, to the dtype asked for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...codes import COLUMNS


def made(n: Any, like: Tensor) -> Any:
    """Noise as a tensor: ``n`` itself, or made from its ``Philox`` (``fastdiff.ops.Philox``). None passes through."""
    return n if n is None or isinstance(n, Tensor) else n.tensor(like.shape, like.device)


def savable(*tensors: Any) -> list[Any]:
    """The same, with copies of what was made under ``torch.inference_mode``, which autograd cannot save afterwards."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        return list(tensors)
    return [t.clone() if isinstance(t, Tensor) and t.is_inference() else t for t in tensors]


def noise(
    x0: Tensor, n: Any, alpha: Tensor, sigma: Tensor, perturbation: float, xi: Any, keep_noise: bool
) -> tuple[Tensor, Any]:
    """(alpha x0 + sigma (n + perturbation xi), n as a tensor or, without ``keep_noise``, as it came)."""
    dtype = alpha.dtype
    alpha, sigma = savable(alpha, sigma)
    source, n = n, made(n, x0)
    if n is not source:
        n = n.to(dtype)
    seen = n.to(dtype)
    if xi is not None:
        seen = seen + perturbation * made(xi, x0).to(dtype)
    x_t = (alpha * x0.to(dtype) + sigma * seen).to(x0.dtype)
    return x_t, n if keep_noise else source


class _Error(torch.autograd.Function):
    """An error function and its derivatives, in the form that keeps their digits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(e: Tensor, c: Tensor | None, function: str) -> Tensor:
        return error_function(e, c, function)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        e, c, ctx.function = inputs
        ctx.save_for_backward(e, c)
        ctx.save_for_forward(e, c)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        e, c = ctx.saved_tensors
        for_e, for_c, _ = ctx.needs_input_grad
        d_e = upstream * error_derivative(e, c, ctx.function) if for_e else None
        d_c = (upstream * _derivative_by_c(e, c, ctx.function)).sum_to_size(c.shape) if for_c else None
        return d_e, d_c, None

    @staticmethod
    def jvp(ctx, of_e: Tensor | None, of_c: Tensor | None, _: None) -> Tensor:
        e, c = ctx.saved_tensors
        parts = [] if of_e is None else [of_e * error_derivative(e, c, ctx.function)]
        parts += [] if of_c is None else [of_c * _derivative_by_c(e, c, ctx.function)]
        return sum(parts[1:], parts[0])


def error_function(e: Tensor, c: Any, function: str) -> Tensor:
    """rho(e; c), elementwise; c is None for a function without a constant."""
    if function == "mse":
        return e * e
    size = e.abs()
    if function == "l1":
        return size
    if function == "smooth_l1":
        return torch.where(size < c, 0.5 * e * e / c, size - 0.5 * c)
    if function == "pseudo_huber":
        # sqrt(e^2 + c^2) - c cancels for small e; this is the same number without the subtraction.
        root = torch.hypot(e, c)
        return size * torch.where(root.isinf(), 1.0, size / (root + c))
    if function == "log_cosh":
        # ln cosh e = ln(1 + 2 sinh(e / 2)^2) where |e| is small; |e| - ln 2 + ... cancels there.
        small = torch.log1p(2 * torch.sinh(0.5 * size.clamp(max=1)) ** 2)
        return torch.where(size < 1, small, size + torch.log1p(torch.exp(-2 * size)) - math.log(2))
    raise AssertionError(function)


def error_derivative(e: Tensor, c: Any, function: str) -> Tensor:
    """d rho / d e; 0 at the corner of |e|."""
    if function == "mse":
        return 2 * e
    if function == "l1":
        # torch.sign(NaN) is 0, which would hide the NaN.
        return torch.where(e.isnan(), e, e.sign())
    if function == "smooth_l1":
        return torch.where(e.abs() < c, e / c, torch.where(e.isnan(), e, e.sign()))
    if function == "pseudo_huber":
        root = torch.hypot(e, c)
        return torch.where(root.isinf(), e.sign(), e / root)
    if function == "log_cosh":
        return torch.tanh(e)
    raise AssertionError(function)


def _derivative_by_c(e: Tensor, c: Tensor, function: str) -> Tensor:
    """d rho / d c of the functions that have a constant."""
    size = e.abs()
    if function == "smooth_l1":
        return torch.where(size < c, -0.5 * (e / c) ** 2, torch.where(e.isnan(), e, -0.5))
    root = torch.hypot(e, c)
    # c / root - 1, without the subtraction, which cancels for small e.
    return torch.where(root.isinf(), -1.0, -size / root * (size / (root + c)))


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
    """weight * mask * rho(scale * (prediction - (p x0 + q n)); c), summed row by row in float64, then reduced.

    ``weight`` is shaped as the rows (size 1 where elements share a row); "none" returns that shape. What has a mask or
    a weight of 0 is left out: it adds 0, whatever it holds.
    """
    p, q, scale, weight, c, mask = savable(p, q, scale, weight, c, mask)
    e = _scaled_error(prediction, x0, n, p, q, scale, weight.dtype, _kept(weight, mask))
    error = _Error.apply(e, c, function)
    if mask is not None:
        error = mask.to(weight.dtype) * error
    rows = weight * sum_rows(error, weight.shape)
    if reduction == "sum":
        return rows.sum().to(weight.dtype)
    divisor, count = _divisor(prediction, weight, mask, mask_normalization)
    rows = rows / divisor
    return (rows.sum() / count if reduction == "mean" else rows).to(weight.dtype)


def loss_gradient(
    upstream: Tensor,
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
    """The gradient of ``loss`` by the prediction, times ``upstream``, without autograd."""
    dtype = weight.dtype
    factor = upstream * sum_rows(weight, weight.shape)
    if reduction != "sum":
        divisor, count = _divisor(prediction, weight, mask, mask_normalization)
        factor = factor / divisor
        factor = factor / count if reduction == "mean" and weight.numel() else factor
    kept = _kept(weight, mask)
    e = _scaled_error(prediction, x0, n, p, q, scale, dtype, kept)
    gradient = factor.to(dtype) * error_derivative(e, c, function)
    for further in (None if mask is None else mask.to(dtype), scale):
        gradient = gradient if further is None else further * gradient
    return torch.where(kept, gradient, 0.0).to(prediction.dtype)


def _kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """What is not left out, broadcast. A weight that is learned leaves nothing out: its gradient is the row's error."""
    kept = torch.ones_like(weight, dtype=torch.bool) if weight.requires_grad else weight != 0
    return kept if mask is None else kept & (mask != 0)


def _scaled_error(
    prediction: Tensor, x0: Tensor | None, n: Any, p: Any, q: Any, scale: Tensor | None, dtype: torch.dtype,
    kept: Tensor,
) -> Tensor:  # fmt: skip
    target: Tensor | float = 0.0
    if p is not None and x0 is not None:
        target = p * x0.to(dtype)
    if q is not None and n is not None:
        target = target + q * made(n, prediction).to(dtype)
    # 0 before and after the scale: an infinite one makes NaN of it, forward and backward.
    e = torch.where(kept, prediction.to(dtype) - target, 0.0)
    return e if scale is None else torch.where(kept, scale * e, 0.0)


def _divisor(
    prediction: Tensor, weight: Tensor, mask: Tensor | None, normalization: str
) -> tuple[Tensor | float, Tensor | int]:
    """(what the sum of a row is divided by, over how many rows a mean is)"""
    if normalization == "none" or mask is None:
        return float(math.prod(prediction.shape) // max(1, weight.numel())), weight.numel()
    counts = sum_rows(mask.expand(prediction.shape).to(weight.dtype), weight.shape)
    if normalization == "row":
        # A row with nothing in its mask has no mean, and is left out of that of the rows.
        return torch.where(counts == 0, 1.0, counts), (counts != 0).sum().clamp(min=1)
    total = counts.sum()
    return torch.where(total == 0, 1.0, total / max(1, counts.numel())), weight.numel()


def rows_of_mean(prediction: Tensor, weight: Tensor, mask: Tensor | None, normalization: str) -> Tensor | int:
    """Over how many rows the mean of a loss is: under "row" those that have something in their mask."""
    return _divisor(prediction, weight, mask, normalization)[1] if normalization == "row" else weight.numel()


def sum_rows(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum ``values`` over the dimensions in which ``shape`` is 1: float64 of that shape, in a fixed order."""
    dims = [d for d, size in enumerate(shape) if size == 1]
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    return values.sum(dims, keepdim=True, dtype=wide) if dims else values.to(wide)


def convert(m: Tensor, x_t: Tensor, k_x: Tensor, k_m: Tensor, dtype: torch.dtype) -> Tensor:
    """k_x x_t + k_m m."""
    k_x, k_m = savable(k_x, k_m)
    return (k_x * x_t.to(k_x.dtype) + k_m * m.to(k_x.dtype)).to(dtype)


def step(
    x: Tensor,
    m: Tensor,
    uncond: Tensor | None,
    guidance: Tensor | float,
    table: Tensor,
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
    """One sampler step, (y, x0, history entry), of ``table`` [K] or [batch, K]: see ``fastdiff.ops.step``. x0 and the
    entry are None where they are not ``wanted``."""
    shape = table.shape[:-1] + (1,) * (x.ndim if table.ndim > 1 else 0)
    row = {name: table[..., k].reshape(shape[: x.ndim]) for k, name in enumerate(COLUMNS)}
    compute = table.dtype
    x, m = x.to(compute), m.to(compute)
    if uncond is not None:
        uncond = uncond.to(compute)
        m = uncond + guidance * (m - uncond)
    x0 = row["p_x"] * x + row["p_m"] * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    if threshold is not None:
        x0 = x0.clamp(-threshold, threshold) / threshold
    y = row["c_x"] * x + row["c_m"] * m + row["c_x0"] * x0
    for j, entry in enumerate(history, start=1):
        y = y + row[f"c_h{j}"] * entry.to(compute)
    if noise is not None:
        strength = row["c_noise"]
        if log_variance is not None:
            strength = strength * torch.exp(0.5 * (row["l_0"] + row["l_v"] * log_variance.to(compute)))
        y = y + strength * made(noise, x).to(compute)
    if mask is not None:
        assert known is not None
        kept = row["k_x0"] * known.to(compute)
        if known_noise is not None:
            kept = kept + row["k_n"] * made(known_noise, x).to(compute)
        mask = mask.to(compute)
        y = mask * kept + (1 - mask) * y
    if model_input is not None:
        seen = (row["c_in"] * y).to(model_input.dtype)
        for part in model_input.split(len(y)) if len(y) else ():
            part.copy_(seen)
    entry = row["h_x"] * x + row["h_m"] * m + row["h_x0"] * x0 if wanted[1] else None
    return y.to(dtype), x0.to(dtype) if wanted[0] else None, entry
