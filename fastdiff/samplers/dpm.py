"""DPM-Solver++, multistep, for the ODE and the SDE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import prediction as kinds
from ..prediction import Prediction
from ..process import Process, VariancePreserving
from .base import Plan, build_plan
from .schedule import Path, Scheduled
from .spacing import multistep_timesteps

FEW = 15  # below so many steps the last ones are of lower order, if not told otherwise (Lu et al. 2022b, appendix)


@dataclass(frozen=True, kw_only=True)
class MultiStep(Scheduled):
    """Base of the multistep methods, which use the x0 estimates of earlier steps.

    "leading" and "linspace" are spaced as these methods have them in diffusers: without t = 0.

    Args:
        order: 1, 2 or 3. The first steps are of lower order, having no history, and the last step too when it goes to
            clean data, where the log-SNR is infinite.
        lower_order_final: the last steps are of order 2 and 1 (what follows would be extrapolated furthest).
    """

    order: int = 2
    lower_order_final: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3; got {self.order!r}.")

    def spaced(self, process: VariancePreserving, steps: int) -> list[float]:
        if self.spacing != "trailing" and steps == process.steps:
            return super().spaced(process, steps)
        return list(multistep_timesteps(process.steps, steps, self.spacing, self.steps_offset))

    def orders(self, path: Path) -> list[int]:
        """The order of each step."""
        count = len(path.levels.t)
        # A level of pure noise (log-SNR minus infinity) is too far away for an extrapolation from it.
        first = 1 if float(path.alpha[0]) == 0 else 0
        orders = [
            min(self.order, max(1, k - first + 1), max(1, self.order_left(count - k, count))) for k in range(count)
        ]
        if float(path.sigma[-1]) == 0:
            orders[-1] = 1
        return orders

    def order_left(self, left: int, count: int) -> int:
        """The highest order for a step after which ``left`` - 1 follow."""
        return left if self.lower_order_final else self.order


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP(MultiStep):
    """DPM-Solver++ 1M, 2M and 3M (Lu et al. 2022b, algorithm 2), and with eta = 1 its SDE form ("2M SDE").

    Args:
        order: 1, 2 or 3.
        eta: 0 is the ODE, 1 the SDE; between them as in k-diffusion.
        solver_type: "midpoint" or "heun", how order 2 takes its difference. (diffusers' names, and its default.)
        lower_order_final: None: for fewer than 15 steps, as diffusers does.
        s_noise: factor on the noise.
        and those of ``Scheduled``.
    """

    eta: float = 0.0
    solver_type: str = "midpoint"
    lower_order_final: bool | None = None  # type: ignore[assignment]
    s_noise: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta!r}.")
        if self.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type must be 'midpoint' or 'heun'; got {self.solver_type!r}.")

    def order_left(self, left: int, count: int) -> int:
        lowers = count < FEW if self.lower_order_final is None else self.lower_order_final
        return left if lowers else self.order

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        path = self.path(process, steps)
        logs, orders = path.log_ratio.tolist(), self.orders(path)
        alphas, sigmas = path.alpha.tolist(), path.sigma.tolist()

        def weigh(h: Tensor, behind: list[Tensor]) -> Tensor:
            r = [*behind[:1], *(further - near for near, further in zip(behind, behind[1:]))]
            return torch.stack(multistep_weights((1 + self.eta) * h, r, self.solver_type == "midpoint"), -1)

        weights = by_order(path.log_ratio, orders, weigh)
        rows = []
        for k in range(len(orders)):
            alpha, sigma, h = alphas[k + 1], sigmas[k + 1], logs[k + 1] - logs[k]
            noisy = self.eta * h if self.eta else 0.0  # h may be infinite
            row = {"c_x": sigma / sigmas[k] * math.exp(-noisy)}
            row |= {PAST[j]: alpha * w for j, w in enumerate(weights[k])}
            row["c_noise"] = self.s_noise * sigma * math.sqrt(-math.expm1(-2 * noisy))
            rows.append(row)
        columns = stack_rows(rows)
        draws = tuple(row["c_noise"] > 0 for row in rows)
        return build_plan(kinds.get(prediction), path.levels, path.ends, draws, columns, clip=self.clip)


def multistep_weights(z: Tensor, r: Sequence[Tensor | float], midpoint: bool = True, bent: float = 0.0) -> list[Tensor]:
    """The weights, over alpha', of x0 and of the estimates before it in a step of DPM-Solver++.

    Args:
        z: the step in log-SNR, (1 + eta) h; any shape. With -h they are those of DPM-Solver, for noise estimates and
            over sigma'.
        r: how long the steps before are, the latest first, in units of h: none, one or two for order 1, 2 or 3.
        midpoint: order 2 takes its difference as the midpoint method does, not as Heun's.
        bent: added to phi_3 (diffusers' third order of the SDE has 1 here; 0 is right).
    """
    first = -torch.expm1(-z)
    if not r:
        return [first]
    phi_2 = 1 - first / z
    if len(r) == 1:
        second = (first / 2 if midpoint else phi_2) / r[0]
        return [first + second, -second]
    phi_3 = phi_2 / z - 0.5 + bent
    # D1 and D2: first and second derivative of x0 along the log-SNR, from divided differences.
    near, far, both = 1 / r[0], 1 / r[1], 1 / (r[0] + r[1])
    slope, curve = phi_2 * (1 + r[0] * both) - phi_3 * both, -phi_2 * r[0] * both + phi_3 * both
    return [first + slope * near, -slope * near + curve * far, -curve * far]


def by_order(logs: Tensor, orders: list[int], weigh: Callable[[Tensor, list[Tensor]], Tensor]) -> list[list[float]]:
    """The weights of every step: ``weigh(h, behind)`` for all steps of an order at once, h being their lengths in
    log-SNR and ``behind`` how far back the order - 1 estimates before lie, in units of h."""
    found: list[list[float]] = [[] for _ in orders]
    for order in set(orders):
        k = torch.tensor([at for at, own in enumerate(orders) if own == order], device="cpu")
        h = logs[k + 1] - logs[k]
        behind = [(logs[k] - logs[k - j]) / h for j in range(1, order)]
        for at, row in zip(k.tolist(), weigh(h, behind).tolist()):
            found[at] = row
    return found


PAST = ("c_x0", "c_h1", "c_h2", "c_h3", "c_h4")


def stack_rows(rows: list[dict[str, float]]) -> dict[str, Tensor]:
    """Columns from the rows of a multistep method; what a row does not name is 0. h_x0 is 1 in the rows whose x0
    estimate a later row reads."""
    kept = [0.0] * len(rows)
    for k, row in enumerate(rows):
        for j in range(4, 0, -1):
            if row.get(PAST[j]):  # entries are counted backwards from the latest, so those between are kept too
                kept[k - j : k] = [1.0] * j
                break
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name, 0.0) for row in rows] for name in names} | {"h_x0": kept}
    return {name: torch.tensor(values, dtype=torch.float64, device="cpu") for name, values in columns.items()}
