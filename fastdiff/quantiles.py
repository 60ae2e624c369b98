"""Quantile functions that have no formula: tables, made once in float64, and their interpolation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CELLS = 4096
_LEAST = 1e-30  # of the probability on either side, far below the least uniform, 2^-53

# Nodes and weights of Gauss and Legendre's rule on [-1, 1], of degree 15.
_NODES = (0.1834346424956498, 0.5255324099163290, 0.7966664774136267, 0.9602898564975363)
_WEIGHTS = (0.3626837833783620, 0.3137066458778873, 0.2223810344533745, 0.1012285362903763)


def beta_quantiles(a: float, b: float) -> Tensor:
    """A table of the beta distribution for ``interpolate``: float64 [2, 3, knots] on the CPU.

    In y = logit(t) the density, t^a (1 - t)^b / B(a, b), is smooth for every a and b, and has exponential tails. Its
    integral F from the left, and G from the right, are summed over cells by Gauss and Legendre's rule. Row by row:
    ln F, y and dy / d ln F, which is F over the density; then the same of G, from the right.
    """
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    # F ~ exp(a y) / (a B) on the left, G ~ exp(-b y) / (b B) on the right.
    first, last = (math.log(_LEAST * a) + log_beta) / a, -(math.log(_LEAST * b) + log_beta) / b
    # Where a tail is long, the middle would have too few cells: they are even in asinh of the distance from it.
    mode, width = math.log(a / b), math.sqrt(1 / a + 1 / b)
    ends = (math.asinh((end - mode) / width) for end in (first, last))
    y = mode + width * torch.sinh(torch.linspace(*ends, _CELLS + 1, dtype=torch.float64, device="cpu"))

    def density(y: Tensor) -> Tensor:
        return torch.exp(-a * torch.nn.functional.softplus(-y) - b * torch.nn.functional.softplus(y) - log_beta)

    middle, half = (y[1:] + y[:-1]) / 2, (y[1:] - y[:-1]) / 2
    cells = sum(w * half * (density(middle + x * half) + density(middle - x * half)) for x, w in zip(_NODES, _WEIGHTS))
    tail = torch.tensor([_LEAST], dtype=torch.float64, device="cpu")
    of_left = torch.cat([tail, tail + cells.cumsum(0)])
    of_right = torch.cat([tail, tail + cells.flip(0).cumsum(0)]).flip(0)
    f = density(y)
    left = torch.stack([of_left.log(), y, of_left / f])
    right = torch.stack([of_right.log(), y, -of_right / f]).flip(1)
    return torch.stack([left, right])


def interpolate(table: Tensor, u: Tensor) -> Tensor:
    """The quantiles at ``u``, float64 of any shape in (0, 1), from a ``table`` of ``beta_quantiles`` on u's device:
    sigmoid(y) by cubics through the values and slopes of neighbouring knots, from the side that is nearer.
    """
    found = []
    for side, p in zip(table, (u, 1 - u)):
        log = p.log()
        k = torch.searchsorted(side[0].contiguous(), log.contiguous()).clamp(1, side.shape[1] - 1)
        (x0, y0, m0), (x1, y1, m1) = side[:, k - 1], side[:, k]
        h = x1 - x0
        s = ((log - x0) / h).clamp(0, 1)
        rest = 1 - s
        found.append((1 + 2 * s) * rest * rest * y0 + s * s * (3 - 2 * s) * y1 + h * s * rest * (rest * m0 - s * m1))
    return torch.sigmoid(torch.where(u < 0.5, *found))


def steps_of(weights: Sequence[float]) -> Tensor:
    """A table for ``stepwise``: the probabilities of the parts before each, and of all: float64 [parts + 1] on the
    CPU."""
    whole, total, found = math.fsum(weights), 0.0, [0.0]
    for weight in weights:
        total += weight
        found.append(min(total / whole, 1.0))
    found[-1] = 1.0
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def stepwise(table: Tensor, u: Tensor) -> Tensor:
    """The quantiles of a density that is even within each of equal parts of [0, 1]."""
    parts = len(table) - 1
    k = torch.searchsorted(table, u.contiguous(), right=True).clamp(1, parts) - 1
    below, above = table[k], table[k + 1]
    # A part may not reach into the next: that has a probability of its own, which may be 0.
    within = ((u - below) / (above - below)).clamp(0, 1 - 2.0**-53)
    return ((k + within) / parts).minimum(torch.nextafter((k + 1) / parts, torch.zeros_like(u)))
