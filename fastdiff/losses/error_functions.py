"""Error functions: each is one of five elementwise functions, a per-row constant c and a per-row factor; and weighted
sums of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calls import Combination
from ..names import find
from ..numeric import check_fields, check_numbers
from ..process import Levels, check_by
from ..showing import brief

# The elementwise functions of the kernels, and those with a constant c. C++ has the same (csrc/cpu/error_functions.h).
FUNCTIONS = ("mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh")
NEED_C = ("smooth_l1", "pseudo_huber")


class Loss:
    """Base. ``function`` names the elementwise function of ``fastdiff.ops.loss``; ``rows`` gives its parameters, and
    ``numbers`` those that are the same at all levels."""

    function: str | Combination

    def __post_init__(self):
        check_fields(self)

    @property
    def uses_c(self) -> bool:
        return self.function in NEED_C

    def numbers(self) -> tuple[float | None, float | None]:
        """(c, factor); c is None where there is none, and both are None where they follow the level."""
        return None, 1.0

    @property
    def fixed(self) -> tuple[float | None, float | None]:
        """``numbers``; (None, None) where a class has ``rows`` of its own without them."""
        rows, numbers = (
            next(k for k, base in enumerate(type(self).__mro__) if name in vars(base)) for name in ("rows", "numbers")
        )
        return self.numbers() if numbers <= rows else (None, None)

    def rows(self, levels: Levels) -> tuple[Tensor | None, Tensor | float]:
        """(c or None, factor): float64 of the levels' shape (or a number); the error is factor * function(e; c)."""
        c, factor = self.numbers()
        return None if c is None else torch.full_like(levels.alpha, c), factor


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

    def numbers(self) -> tuple[float, float]:
        return self.beta, 1.0


@dataclass(frozen=True)
class Huber(Loss):
    """e^2 / 2 where abs(e) < delta, else delta (abs(e) - delta / 2): delta times SmoothL1(delta)."""

    delta: float = 1.0
    function = "smooth_l1"

    def __post_init__(self):
        super().__post_init__()
        _positive("delta", self.delta)

    def numbers(self) -> tuple[float, float]:
        return self.delta, self.delta


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

    def numbers(self) -> tuple[float | None, float | None]:
        c = self.scale * self.c if self.schedule == "constant" else None
        scaled = None if c is None else 2 * c
        return c, {"plain": 1.0, "normalized": 2.0, "scaled": scaled}[self.form]

    def rows(self, levels: Levels) -> tuple[Tensor | None, Tensor | float]:
        if self.schedule == "constant":
            return super().rows(levels)
        if self.schedule == "exponential":
            c = torch.exp(levels.measured(self.by) * math.log(self.c))
        else:
            # 1 / (1 + sigma / alpha), written without the division by alpha = 0.
            c = (1 - self.c) * (levels.alpha / (levels.alpha + levels.sigma)) ** 2 + self.c
        c = c if self.scale == 1 else self.scale * c
        return c, 2 * c if self.form == "scaled" else self.numbers()[1]


@dataclass(frozen=True)
class LogCosh(Loss):
    """ln cosh e."""

    function = "log_cosh"


@dataclass(frozen=True, init=False, repr=False)
class Combined(Loss):
    """A weighted sum of error functions, in one pass: ``Combined(mse=0.5, l1=0.3, log_cosh=0.2)``, or with objects,
    ``Combined((0.5, "mse"), (0.3, Huber(0.1)))``. With one error function of strength 1 it is that function.

    Args:
        parts: (strength, error function) each: a number of at least 0, and a name or an object of ``fastdiff.losses``.
            Those of strength 0 are left out.
        named: the strengths of error functions by their names, at their defaults.

    ``SmoothL1`` and ``Huber`` are one function with a constant of its own, and ``PseudoHuber`` another: of each, all
    parts must have the same constant. Only one may have a c that follows the level.

    Raises TypeError or ValueError for unfit parts, and where all strengths are 0.
    """

    parts: tuple[tuple[float, Loss], ...]

    def __init__(self, *parts: tuple[float, Loss | str], **named: float):
        found = []
        for part in (*parts, *((strength, name) for name, strength in named.items())):
            if not isinstance(part, (tuple, list)) or len(part) != 2:
                raise TypeError(f'Combined takes (strength, error function), such as (0.3, "l1"); got {brief(part)}.')
            strength, loss = part[0], get(part[1])
            check_numbers(**{f"the strength of {loss!r}": strength})
            if not 0 <= strength < math.inf:
                raise ValueError(f"the strength of {loss!r} must be a number of at least 0; got {strength!r}.")
            if isinstance(loss, Combined):
                raise ValueError("a Combined takes no other: write their parts in one.")
            if strength > 0:
                found.append((float(strength), loss))
        if not found:
            raise ValueError("Combined needs an error function with a strength above 0.")
        object.__setattr__(self, "parts", tuple(found))
        object.__setattr__(self, "_function", found[0][1].function if len(found) == 1 else self._combination())

    def _combination(self) -> Combination:
        strengths: dict[str, float] = {}
        constants: dict[str, tuple[float | None, Loss]] = {}
        for strength, loss in self.parts:
            function, (c, factor) = loss.function, loss.fixed
            if factor is None:
                hint = ' That of form="normalized" does not.' if isinstance(loss, PseudoHuber) else ""
                raise ValueError(f"{loss!r} has a factor that follows the level, and cannot be combined.{hint}")
            if loss.uses_c:
                other, of = constants.setdefault(function, (c, loss))
                if c != other or (c is None and of != loss):
                    raise ValueError(f"{of!r} and {loss!r} are one function with two constants: combine one of them.")
            strengths[function] = strengths.get(function, 0.0) + strength * factor
        if sum(c is None for c, _ in constants.values()) > 1:
            raise ValueError("only one part of a Combined may have a c that follows the level.")
        return Combination(**strengths, **{f"c_{function}": c for function, (c, _) in constants.items()})

    @property
    def function(self) -> str | Combination:
        return self._function

    @property
    def uses_c(self) -> bool:
        return self._function.uses_c if isinstance(self._function, Combination) else super().uses_c

    def numbers(self) -> tuple[float | None, float | None]:
        if len(self.parts) > 1:
            return None, 1.0
        ((strength, loss),) = self.parts
        c, factor = loss.fixed
        return c, None if factor is None else strength * factor

    def rows(self, levels: Levels) -> tuple[Tensor | None, Tensor | float]:
        if len(self.parts) == 1:
            ((strength, loss),) = self.parts
            c, factor = loss.rows(levels)
            return c, strength * factor
        scheduled = [loss for _, loss in self.parts if loss.uses_c and loss.numbers()[0] is None]
        return scheduled[0].rows(levels)[0] if scheduled else None, 1.0

    def __repr__(self) -> str:
        return f"Combined({', '.join(map(repr, self.parts))})"


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
    if not 0 < value < math.inf:
        raise ValueError(
            f"{name} must be positive and finite; got {value!r}. For an unsmoothed error use L1(), for a squared one "
            "MSE()."
        )
