"""UniPC: a predictor and a corrector of the same order, folded into one linear step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .. import prediction as kinds
from ..prediction import Prediction
from ..process import Process
from .base import Plan, build_plan
from .dpm import PAST, MultiStep, stack_rows


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
        predicted: list[float] = []
        for k, order in enumerate(orders):
            # Weights of x0 and the estimates before it: first those that the corrector adds to x.
            weights = [0.0] * 5
            ratio = sigmas[k + 1] / sigmas[k]
            if k and k - 1 not in self.disable_corrector:
                h, r = logs[k] - logs[k - 1], self._places(logs, k - 1, orders[k - 1])
                for j, weight in enumerate(self._bend(h, r, corrects=True)):
                    weights[j] += ratio * alphas[k] * weight
                for j, weight in enumerate(predicted, start=1):
                    weights[j] -= ratio * alphas[k] * weight
            h = logs[k + 1] - logs[k]
            predicted = self._bend(h, self._places(logs, k, order), corrects=False)[1:]
            for j, weight in enumerate(predicted):
                weights[j] += alphas[k + 1] * weight
            weights[0] += alphas[k + 1] * -math.expm1(-h)
            rows.append({"c_x": ratio} | dict(zip(PAST, weights)))
        draws = (False,) * len(rows)
        return build_plan(kinds.get(prediction), path.levels, path.ends, draws, stack_rows(rows), clip=self.clip)

    @staticmethod
    def _places(logs: list[float], k: int, order: int) -> list[float]:
        """Where the estimates before that of step k lie, in units of the step: negative."""
        return [(logs[k - j] - logs[k]) / (logs[k + 1] - logs[k]) for j in range(1, order)]

    def _bend(self, h: float, r: list[float], corrects: bool) -> list[float]:
        """Weights, over alpha', of the x0 estimates at the end of a step, at its start and before it, of what is added
        to the first-order step of length h in log-SNR; the first is 0 unless ``corrects``."""
        order = len(r) + 1
        if (order == 1 and not corrects) or (math.isinf(h) and self.solver_type == "bh1"):
            return [0.0] * (order + 1)
        scale = -h if self.solver_type == "bh1" else math.expm1(-h)
        places = [*r, 1.0] if corrects else r
        if len(places) == 1:
            rho = [0.5]  # both orders' own simplification
        else:
            rho = solve_powers(places, [moment / scale for moment in self._moments(-h, len(places))])
        # Differences to the estimate at the start, over their places.
        differences = [-scale * weight / place for weight, place in zip(rho, places)]
        return [differences[-1] if corrects else 0.0, -sum(differences), *differences[: order - 1]]

    @staticmethod
    def _moments(z: float, count: int) -> list[float]:
        """n! z phi_(n + 1)(z), n = 1 .. count, phi of exponential integrators."""
        phi, values = math.expm1(z) / z - 1, []
        for n in range(1, count + 1):
            values.append(phi * math.factorial(n))
            phi = phi / z - 1 / math.factorial(n + 1)
        return values


def solve_powers(places: list[float], right: list[float]) -> list[float]:
    """w with sum_m w_m places_m^n = right_n, n = 0, 1, ..., for a few places: by Lagrange's polynomials."""
    weights = []
    for m, place in enumerate(places):
        polynomial, divisor = [1.0], 1.0  # coefficients, the constant first
        for other in places[:m] + places[m + 1 :]:
            polynomial = [a - other * b for a, b in zip([0.0, *polynomial], [*polynomial, 0.0])]
            divisor *= place - other
        weights.append(sum(c * moment for c, moment in zip(polynomial, right)) / divisor)
    return weights
