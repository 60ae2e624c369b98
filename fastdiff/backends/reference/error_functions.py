"""The error functions and their derivatives, each in a form that does not lose digits to cancellation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...calls import Combination

_FUNCTIONS = [name for name in Combination._fields if not name.startswith("c_")]


class Error(torch.autograd.Function):
    """``error_function`` for autograd, forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(e: Tensor, c: Tensor | None, function: str | Combination) -> Tensor:
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


def _combined(of: Callable[..., Tensor], e: Tensor, c: Any, parts: Combination) -> Tensor:
    """The weighted sum of ``of(e, c, function)``."""
    terms = []
    for function in _FUNCTIONS:
        strength, own = getattr(parts, function), getattr(parts, f"c_{function}", 1.0)
        if strength != 0:
            terms.append(strength * of(e, c if own is None else e.new_full((), own), function))
    return sum(terms[1:], terms[0])


def error_function(e: Tensor, c: Any, function: str | Combination) -> Tensor:
    """rho(e; c), elementwise; c is None for a function without a constant."""
    if isinstance(function, Combination):
        return _combined(error_function, e, c, function)
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


def error_derivative(e: Tensor, c: Any, function: str | Combination) -> Tensor:
    """d rho / d e; 0 at the corner of |e|."""
    if isinstance(function, Combination):
        return _combined(error_derivative, e, c, function)
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


def _derivative_by_c(e: Tensor, c: Tensor, function: str | Combination) -> Tensor:
    """d rho / d c of the functions that have a constant; of a weighted sum, those that have the row's."""
    if isinstance(function, Combination):
        of_row = [name for name in _FUNCTIONS if getattr(function, f"c_{name}", 1.0) is None]
        terms = [getattr(function, name) * _derivative_by_c(e, c, name) for name in of_row]
        return sum(terms[1:], terms[0])
    size = e.abs()
    if function == "smooth_l1":
        return torch.where(size < c, -0.5 * (e / c) ** 2, torch.where(e.isnan(), e, -0.5))
    root = torch.hypot(e, c)
    # c / root - 1, without the subtraction, which cancels for small e.
    return torch.where(root.isinf(), -1.0, -size / root * (size / (root + c)))
