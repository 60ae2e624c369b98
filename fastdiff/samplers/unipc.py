"""UniPC: a predictor and a corrector of the same order, folded into one linear step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import prediction as kinds
from ..prediction import Prediction
from ..process import Process
from .base import Plan, build_plan
from .dpm import PAST, MultiStep, by_order, stack_rows


@dataclass(frozen=True, kw_only=True)
class UniPC(MultiStep):
    """UniPC (Zhao et al. 2023) with B(h) = bh1 or bh2, predicting x0, on every process.

    The corrector replaces x by another combination of what led to it and of the new x0 estimate. What led to it, x
    itself, is the predictor's result; so corrected x = x + a combination of x0 estimates, and no second x is kept.

    Args:
        order: 1, 2 or 3.
        solver_type: "bh1" or "bh2".
        lower_order_final: the last steps have order 2 and 1.
        disable_corrector: the steps, counted from 0, whose result is not corrected.
        and those of ``Scheduled``.
    """

    solver_type: str = "bh2"
    disable_corrector: Sequence[int] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.solver_type not in ("bh1", "bh2"):
            raise ValueError(f"solver_type must be 'bh1' or 'bh2'; got {self.solver_type!r}.")

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        path = self.path(process, steps)
        logs, orders = path.log_ratio.tolist(), self.orders(path)
        alphas, sigmas = path.alpha.tolist(), path.sigma.tolist()
        rows = []
        predicts, corrects = (
            by_order(
                path.log_ratio,
                orders,
                lambda h, behind, corrects=corrects: bend(h, [-r for r in behind], corrects, self.solver_type),
            )
            for corrects in (False, True)
        )
        for k in range(len(orders)):
            # Weights of x0 and the estimates before it: first those that the corrector adds to x.
            weights = [0.0] * 5
            ratio = sigmas[k + 1] / sigmas[k]
            if k and k - 1 not in self.disable_corrector:
                for j, weight in enumerate(corrects[k - 1]):
                    weights[j] += ratio * alphas[k] * weight
                for j, weight in enumerate(predicts[k - 1][1:], start=1):
                    weights[j] -= ratio * alphas[k] * weight
            for j, weight in enumerate(predicts[k][1:]):
                weights[j] += alphas[k + 1] * weight
            weights[0] += alphas[k + 1] * -math.expm1(-(logs[k + 1] - logs[k]))
            rows.append({"c_x": ratio} | dict(zip(PAST, weights)))
        draws = (False,) * len(rows)
        return build_plan(kinds.get(prediction), path.levels, path.ends, draws, stack_rows(rows), clip=self.clip)


def bend(h: Tensor, r: Sequence[Tensor], corrects: bool, solver_type: str = "bh2") -> Tensor:
    """What UniPC adds to the first-order step: weights, over alpha', of the x0 estimates at the end of a step, at its
    start and before it, [..., order + 1]; the first is 0 unless ``corrects`` (UniC).

    Args:
        h: the step in log-SNR, any shape; may be infinite. With -h they are those of noise estimates, over sigma'.
        r: where the order - 1 estimates before lie, in units of h and negative, shaped as h.
    """
    order = len(r) + 1
    weights = torch.zeros((*h.shape, order + 1), dtype=torch.float64, device="cpu")
    if order == 1 and not corrects:
        return weights
    scale = -h if solver_type == "bh1" else torch.expm1(-h)
    places = torch.stack([*r, torch.ones_like(h)] if corrects else list(r), -1)
    count = places.shape[-1]
    if count == 1:
        rho = torch.full_like(places, 0.5)  # both orders' own simplification
    else:
        rho = _rho(places, _moments(-h, count) / scale[..., None])
    # Differences to the estimate at the start, over their places.
    differences = -scale[..., None] * rho / places
    weights[..., 1] = -differences.sum(-1)
    weights[..., 2 : order + 1] = differences[..., : order - 1]
    if corrects:
        weights[..., 0] = differences[..., -1]
    if solver_type == "bh1":
        weights = torch.where(h.isinf()[..., None], 0.0, weights)
    return weights


def _moments(z: Tensor, count: int) -> Tensor:
    """n! z phi_(n + 1)(z), n = 1 .. count, [..., count], phi of exponential integrators."""
    phi, values = torch.expm1(z) / z - 1, []
    for n in range(1, count + 1):
        values.append(phi * math.factorial(n))
        phi = phi / z - 1 / math.factorial(n + 1)
    return torch.stack(values, -1)


def _rho(places: Tensor, moments: Tensor) -> Tensor:
    """The solution of sum_j places_j^i rho_j = moments_i, i = 0 .. n - 1, [..., n]: by Lagrange's polynomials."""
    count, found = places.shape[-1], []
    for j in range(count):
        polynomial, scale = [torch.ones_like(moments[..., 0])], 1.0  # of (x - places_i), i != j, the constant first
        for i in range(count):
            if i != j:
                shifted = [torch.zeros_like(polynomial[0]), *polynomial]
                scaled = [places[..., i] * factor for factor in polynomial] + [0.0]
                polynomial = [a - b for a, b in zip(shifted, scaled)]
                scale = scale * (places[..., j] - places[..., i])
        found.append(sum(factor * moments[..., i] for i, factor in enumerate(polynomial)) / scale)
    return torch.stack(found, -1)
