"""What the columns of several schedulers have in common. A function of columns gives a dictionary of float64 tensors
[rows]: the coefficients of ``fastdiff.ops.step`` by name, made from the numbers that a scheduler holds
(``alphas_cumprod``, ``sigmas``). ``p_x`` and ``p_m`` give what the scheduler calls the predicted original sample, or
whatever it keeps of the model's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import prediction as kinds
from ...process import Levels, Process

Columns = dict[str, Tensor]
_ANY = Process()  # levels that are given as numbers, of no process in particular


def converted(
    kind: str, alpha: Tensor, sigma: Tensor, to: str = "sample", process: Process | None = None
) -> tuple[Tensor, Tensor]:
    """(k_x, k_m) of the estimate ``to`` from a prediction of ``kind`` at levels (alpha, sigma), [rows] each."""
    return kinds.conversion(kind, to, Levels(alpha, alpha, sigma, process or _ANY))


def estimate(kind: str, alpha: Tensor, sigma: Tensor, process: Process | None = None) -> Columns:
    """The columns of the x0 estimate, from a prediction of ``kind`` at levels (alpha, sigma), [rows] each."""
    p_x, p_m = converted(kind, alpha, sigma, "sample", process)
    return {"p_x": p_x, "p_m": p_m}


def levels_and_ends(sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha = 1, and the sigmas from and to which steps go, [steps] each, of sigmas [steps + 1]."""
    return torch.ones_like(sigmas[1:]), sigmas[:-1], sigmas[1:]


def levels_of(sigmas: Tensor, flow: bool) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the sigmas of DPM-Solver and UniPC: sigma / alpha with variance preserved, or of a flow."""
    if flow:
        return 1 - sigmas, sigmas
    alpha = 1 / torch.hypot(torch.ones_like(sigmas), sigmas)
    return alpha, sigmas * alpha


def folded(columns: Columns) -> Columns:
    """The same where the x0 estimate is not clipped: what the estimate adds is written as what x and the model's output
    add, so that nothing is rounded, or cancels, on the way."""
    columns = dict(columns)
    for to, of_x, of_m in (("c_x0", "c_x", "c_m"), ("h_x0", "h_x", "h_m")):
        factor = columns.pop(to, None)
        if factor is not None:
            columns[of_x] = columns.get(of_x, 0.0) + factor * columns["p_x"]
            columns[of_m] = columns.get(of_m, 0.0) + factor * columns["p_m"]
    return columns
