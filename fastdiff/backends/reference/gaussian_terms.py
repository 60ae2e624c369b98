"""rho of ``fastdiff.ops.gaussian_kl`` and its derivatives, each in a form that does not lose digits to cancellation.

Of a bin with the ends a+- = (-d +- h) exp(-L / 2), the probability is sigmoid(A) - sigmoid(B), where A = f(a+) and
B = f(a-), f(a) = 2 c (a + k a^3), so that sigmoid(f) is the tanh that approximates the normal distribution function.
Its logarithm is ln sigmoid(A) + ln sigmoid(-B) + ln(1 - exp(B - A)). Differences of A and B, and of f', are taken by
their factor a+ - a- = 2 h exp(-L / 2), which is exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

K, C2 = 0.044715, 2 * math.sqrt(2 / math.pi)  # of the tanh
EDGE = 0.999  # data beyond it lies in the outermost bins
LEAST = math.log(1e-12)  # of a bin's ln P
# exp(z) - 1 - z = z^2 (1/2 + z/6 + ...) for |z| < 1, the last first: what float64 sees of it.
_SERIES = [1 / math.factorial(k) for k in range(19, 1, -1)]


def rho(d: Tensor, log_variance: Tensor, l_q: Tensor, half_width: Tensor | None, x0: Tensor | None) -> Tensor:
    """rho, elementwise and differentiable; the shapes broadcast. A program that is traced takes no function with
    forward-mode derivatives of its own: there autograd differentiates the formula."""
    formula = term if torch.compiler.is_compiling() else _Term.apply
    return formula(d, log_variance, l_q, half_width, x0)


class _Term(torch.autograd.Function):
    """rho for autograd, forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(d: Tensor, log_variance: Tensor, l_q: Tensor, half_width: Tensor | None, x0: Tensor | None) -> Tensor:
        return term(d, log_variance, l_q, half_width, x0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad
        found = derivatives(*inputs)
        return *((upstream * f).sum_to_size(i.shape) if n else None for f, i, n in zip(found, inputs, needed)), None

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None) -> Tensor:
        parts = [t * f for t, f in zip(tangents, derivatives(*ctx.saved_tensors)) if t is not None]
        return sum(parts[1:], parts[0])


class Slopes(NamedTuple):
    """The derivatives of rho by d, the model's log-variance, the true one, and the half-width of a bin."""

    d: Tensor
    log_variance: Tensor
    l_q: Tensor
    half_width: Tensor


def term(d: Tensor, log_variance: Tensor, l_q: Tensor, half_width: Tensor | None, x0: Tensor | None) -> Tensor:
    """rho, elementwise; the shapes broadcast."""
    if half_width is None:
        return _divergence(d, log_variance, l_q)
    is_divergence, is_bin = _kinds(half_width)
    of_bin = -_Bin(*_inputs_of_bins(is_bin, d, log_variance, half_width), x0).log_probability()
    d, log_variance, l_q = _inputs_of_others(is_bin, is_divergence, d, log_variance, l_q)
    others = torch.where(is_divergence, _divergence(d, log_variance, l_q), _density(d, log_variance))
    return torch.where(is_bin, of_bin, others)


def derivatives(d: Tensor, log_variance: Tensor, l_q: Tensor, half_width: Tensor | None, x0: Tensor | None) -> Slopes:
    """The derivatives of rho, elementwise."""
    if half_width is None:
        return _slopes(d, log_variance, torch.expm1(l_q - log_variance), 0.5)
    is_divergence, is_bin = _kinds(half_width)
    of_bin = _Bin(*_inputs_of_bins(is_bin, d, log_variance, half_width), x0).slopes()
    d, log_variance, l_q = _inputs_of_others(is_bin, is_divergence, d, log_variance, l_q)
    excess = torch.where(is_divergence, torch.expm1(l_q - log_variance), -1.0)
    others = _slopes(d, log_variance, excess, torch.where(is_divergence, 0.5, 0.0))
    return Slopes(*(torch.where(is_bin, b, o) for b, o in zip(of_bin, others)))


def _kinds(half_width: Tensor) -> tuple[Tensor, Tensor]:
    """(whether a row is a KL divergence, whether it is of bins). NaN is a bin: its terms are NaN."""
    return half_width < 0, ~(half_width <= 0)


# What a form is not for is replaced before it: an infinity there would make NaN of derivatives.


def _inputs_of_bins(is_bin: Tensor, d: Tensor, log_variance: Tensor, half_width: Tensor) -> tuple[Tensor, ...]:
    return torch.where(is_bin, d, 0.0), torch.where(is_bin, log_variance, 0.0), torch.where(is_bin, half_width, 1.0)


def _inputs_of_others(
    is_bin: Tensor, is_divergence: Tensor, d: Tensor, log_variance: Tensor, l_q: Tensor
) -> tuple[Tensor, ...]:
    log_variance = torch.where(is_bin, 0.0, log_variance)
    return torch.where(is_bin, 0.0, d), log_variance, torch.where(is_divergence, l_q, log_variance)


def _divergence(d: Tensor, log_variance: Tensor, l_q: Tensor) -> Tensor:
    z = l_q - log_variance
    inner = z.clamp(-1, 1)
    series: Any = _SERIES[0]
    for coefficient in _SERIES[1:]:
        series = series * inner + coefficient
    excess = torch.where(z.abs() < 1, inner * inner * series, torch.expm1(z) - z)
    return 0.5 * (excess + d * d * torch.exp(-log_variance))


def _density(d: Tensor, log_variance: Tensor) -> Tensor:
    return 0.5 * (log_variance + math.log(2 * math.pi) + d * d * torch.exp(-log_variance))


def _slopes(d: Tensor, log_variance: Tensor, excess: Tensor, by_l_q: Tensor | float) -> Slopes:
    """``excess``: exp(z) - 1 of a divergence; -1 of a density, which has no exp(z)."""
    of_d = d * torch.exp(-log_variance)
    return Slopes(of_d, -0.5 * (excess + d * of_d), by_l_q * excess, torch.zeros_like(of_d))


class _Bin:
    """A bin. ``lower`` and ``upper``: the data is in the lowest, or in the highest one."""

    def __init__(self, d: Tensor, log_variance: Tensor, half_width: Tensor, x0: Tensor):
        self.lower, self.upper = x0 < -EDGE, x0 > EDGE
        self.inverse = torch.exp(-0.5 * log_variance)  # of the standard deviation
        # Beyond the bounds all has settled, and cubes would overflow.
        self.plus, self.minus = ((end - d).mul(self.inverse).clamp(-1e12, 1e12) for end in (half_width, -half_width))
        self.width = 2 * half_width * self.inverse  # plus - minus
        self.squares = self.plus * self.plus + self.plus * self.minus + self.minus * self.minus
        self.A, self.B = (C2 * a * (1 + K * a * a) for a in (self.plus, self.minus))
        self.apart = C2 * self.width * (1 + K * self.squares)  # A - B
        below = torch.where(self.upper, 0.0, F.logsigmoid(self.A))
        above = torch.where(self.lower, 0.0, F.logsigmoid(-self.B))
        between = torch.where(self.lower | self.upper, 0.0, _log_1_minus_exp(self.apart))
        self.logarithm = below + above + between

    def log_probability(self) -> Tensor:
        return torch.where(self.logarithm < LEAST, LEAST, self.logarithm)

    def slopes(self) -> Slopes:
        """Of minus the logarithm. 0 where the probability is the least."""
        f_plus, f_minus = (C2 * (1 + 3 * K * a * a) for a in (self.plus, self.minus))  # f'
        below = torch.where(self.upper, 0.0, torch.sigmoid(-self.A)) * f_plus
        above = torch.where(self.lower, 0.0, torch.sigmoid(self.B)) * f_minus
        edge = self.lower | self.upper
        ratio = torch.where(edge, 0.0, 1 / torch.expm1(torch.where(edge, 1.0, self.apart)))
        turn = ratio * (C2 * 3 * K) * self.width * (self.plus + self.minus)  # ratio (f'(a+) - f'(a-))
        stretch = ratio * C2 * self.width * (1 + 3 * K * self.squares)  # ratio (a+ f'(a+) - a- f'(a-))
        by_d = self.inverse * (below - above + turn)
        by_log_variance = 0.5 * (below * self.plus - above * self.minus + stretch)
        by_half_width = -self.inverse * (below + above + ratio * (f_plus + f_minus))
        found = by_d, by_log_variance, torch.zeros_like(by_d), by_half_width
        return Slopes(*(torch.where(self.logarithm < LEAST, 0.0, slope) for slope in found))


def _log_1_minus_exp(x: Tensor) -> Tensor:
    """ln(1 - exp(-x)) for x > 0."""
    small = x < math.log(2)
    near = torch.log(-torch.expm1(-torch.where(small, x, 1.0)))
    return torch.where(small, near, torch.log1p(-torch.exp(-torch.where(small, 1.0, x))))
