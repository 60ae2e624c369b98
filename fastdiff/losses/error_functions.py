"""Error functions: each is one of five elementwise functions, a per-row constant c and a per-row factor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..names import find
from ..numeric import check_fields
from ..process import Levels, check_by
from ..showing import brief

# The elementwise functions of the kernels, and those with a constant c. C++ has the same (csrc/cpu/error_functions.h).
FUNCTIONS = ("mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh")
NEED_C = ("smooth_l1", "pseudo_huber")


class Loss:
    """Base. ``function`` names the elementwise function of ``fastdiff.ops.loss``; ``rows`` gives its parameters."""

    function: str

    def __post_init__(self):
        check_fields(self)

    @property
    def uses_c(self) -> bool:
        return self.function in NEED_C

    def rows(self, levels: Levels) -> tuple[Tensor | None, Tensor | float]:
        """(c or None, factor): float64 of the levels' shape (or a number); the error is factor * function(e; c)."""
        return None, 1.0


@dataclass(frozen=True)
class MSE(Loss):
    """e^2."""

    function = "mse"


@dataclass(frozen=True)
class L1(Loss):
    """abs(e)."""

    function = "l1"


@dataclass(frozen=True)
class SmoothL1(Loss):
    """e^2 / (2 beta) where abs(e) < beta, else abs(e) - beta / 2."""

    beta: float = 1.0
    function = "smooth_l1"

    def __post_init__(self):
        super().__post_init__()
        _positive("beta", self.beta)

    def rows(self, levels: Levels) -> tuple[Tensor | None, Tensor | float]:
        return torch.full_like(levels.alpha, self.beta), 1.0


@dataclass(frozen=True)
class Huber(Loss):
    """e^2 / 2 where abs(e) < delta, else delta (abs(e) - delta / 2): delta times SmoothL1(delta)."""

    delta: float = 1.0
    function = "smooth_l1"

    def __post_init__(self):
        super().__post_init__()
        _positive("delta", self.delta)

    def rows(self, levels: Levels) -> tuple[Tensor | None, Tensor | float]:
        return torch.full_like(levels.alpha, self.delta), self.delta


@dataclass(frozen=True)
class PseudoHuber(Loss):
    """sqrt(e^2 + c^2) - c of each element ("plain"), 2 c (...) ("scaled") or 2 (...) ("normalized"). (Song and
    Dhariwal 2024 take it of a sample's norm instead, sqrt(sum of e^2 + c^2) - c: see docs/recipes.md.)

    ``schedule`` makes c a function of the row: "constant"; "exponential" c^(t / T), falling from 1 to c; "snr"
    (1 - c) / (1 + sigma / alpha)^2 + c, falling from 1 to c (both after Khrapov et al. 2024). ``by="sigma"`` makes the
    exponential one c^sigma: of a shifted flow, t is the time before the shift, and trainers go by the sigma after it.
    ``scale`` is a factor on the c that comes of this, whatever the schedule.
    """

    c: float = 0.1
    form: str = "plain"
    schedule: str = "constant"
    by: str = "fraction"
    scale: float = 1.0
    function = "pseudo_huber"

    def __post_init__(self):
        super().__post_init__()
        _positive("c", self.c)
        _positive("scale", self.scale)
        if self.form not in ("plain", "scaled", "normalized"):
            raise ValueError(f"form must be one of plain, scaled, normalized; got {self.form!r}.")
        if self.schedule not in ("constant", "exponential", "snr"):
            raise ValueError(f"schedule must be one of constant, exponential, snr; got {self.schedule!r}.")
        check_by(self.by)
        if self.by != "fraction" and self.schedule != "exponential":
            raise ValueError(f"by={self.by!r} goes with schedule='exponential'; got schedule={self.schedule!r}.")

    def rows(self, levels: Levels) -> tuple[Tensor | None, Tensor | float]:
        if self.schedule == "constant":
            c = torch.full_like(levels.alpha, self.c)
        elif self.schedule == "exponential":
            c = torch.exp(levels.measured(self.by) * math.log(self.c))
        else:
            # 1 / (1 + sigma / alpha), written without the division by alpha = 0.
            c = (1 - self.c) * (levels.alpha / (levels.alpha + levels.sigma)) ** 2 + self.c
        c = c if self.scale == 1 else self.scale * c
        return c, 1.0 if self.form == "plain" else 2.0 if self.form == "normalized" else 2 * c


@dataclass(frozen=True)
class LogCosh(Loss):
    """ln cosh e."""

    function = "log_cosh"


_NAMES = {
    "mse": MSE,
    "l1": L1,
    "smooth_l1": SmoothL1,
    "huber": Huber,
    "pseudo_huber": PseudoHuber,
    "log_cosh": LogCosh,
}


def get(loss: Loss | str) -> Loss:
    """A loss from its name or itself. Raises ValueError for an unknown name, TypeError for anything else."""
    if isinstance(loss, str):
        return find("loss", loss, _NAMES, {"l2": "mse"}, "a fastdiff.losses object")()
    if not isinstance(loss, Loss):
        raise TypeError(
            f"loss must be one of {', '.join(_NAMES)}, or a fastdiff.losses object such as Huber(0.1); "
            f"got {brief(loss)}."
        )
    return loss


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive; got {value!r}. For an unsmoothed error use L1().")
