"""The coefficients of an objective, at the times of a batch, and the programs that compute them.

The formulas of the process, the prediction, the weighting and the error function are the definition. A backend runs a
program of them (``fastdiff.program``) if they can be traced and cannot change unnoticed (``fastdiff.constancy``). The
program of a discrete process looks rows up in a table, which is checked when the objective is made. Any other formula
is evaluated by PyTorch for each batch, and ``why`` says why.

A backend computes coefficients in one way for all calls, so a fast call has the numbers of the general way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import prediction as kinds
from . import weighting as weightings
from .constancy import Constancy, NotConstant
from .losses import Loss
from .modes import lasting, version_of, wrapping
from .ops.checks import place_rows
from .prediction import Prediction
from .process import Levels, Process
from .program import NAMES, OF_LOSS, OF_NOISE, Program, Untraceable, lookup, trace
from .showing import warn
from .tensors import gather_rows
from .timesteps import Timesteps
from .weighting import WeightingLike

CHANGED = "{} was changed in place after the batch was noised, so x_t is of another: give noise() a copy, .clone()."
_ENDS = 2.0**-53, 1 - 2.0**-53  # of uniforms


class Traced:
    """A program that is made when it is first asked for. It is made again when a name that the formula reads stands for
    something else.

    Args:
        parts: the functions and objects that the formula is made of: see ``fastdiff.constancy``.
        make: () -> the program; raises Untraceable.
    """

    def __init__(self, parts: tuple[Any, ...], make: Callable[[], Program]):
        self._parts, self._make = parts, make
        self._made: tuple[Program | None, str, Constancy | None] | None = None

    def __getstate__(self) -> dict[str, Any]:  # a copy looks names up by itself
        return self.__dict__ | {"_made": None}

    def program(self) -> Program | None:
        """The program, or None: see ``why``."""
        made = self._made
        if made is None or (made[2] is not None and made[2].names and not made[2].holds()):
            made = self._made = self._traced()
        return made[0]

    @property
    def why(self) -> str:
        """Why there is no program; empty where there is one."""
        self.program()
        return self._made[1]

    def _traced(self) -> tuple[Program | None, str, Constancy | None]:
        try:
            with lasting(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                constancy = Constancy(*self._parts)
                return self._make(), "", constancy
        except (NotConstant, Untraceable) as reason:
            return None, str(reason), None
        except Exception as error:  # the formula's own, which whoever evaluates it is to see
            return None, f"{type(error).__name__}: {error}", None


class Coefficients:
    """The coefficients of a process, a prediction, a weighting and an error function, for as long as none changes.

    Attributes:
        used: the names of the coefficients that noising and the loss need.
        present: which of ``OF_LOSS`` are among them, as bits.
        table: float64 [steps, len(NAMES)] on the CPU, for a discrete process; otherwise None.

    Raises ValueError for a table with NaN or an error scale that is infinite; warns where a weight is infinite.
    """

    def __init__(
        self,
        process: Process,
        prediction: Prediction,
        weighting: WeightingLike,
        loss: Loss,
        error_space: Prediction,
    ):
        self.process, self.prediction, self.weighting = process, prediction, weighting
        self.loss, self.error_space = loss, error_space
        used = {
            "p": prediction.uses_x0,
            "q": prediction.uses_noise,
            "scale": error_space is not prediction,
            "weight": False,
            "c": loss.uses_c,
        }
        self.used = tuple(name for name in NAMES if used.get(name, True))
        self.present = sum(1 << k for k, name in enumerate(OF_LOSS) if name in self.used)
        self.table = self._checked_table() if process.discrete else None
        parts = (process, prediction, weighting, loss, error_space)
        self.traced: Traced | Program = Traced(parts, partial(self._trace, NAMES))
        self.traced_noise = Traced((process,), partial(self._trace, OF_NOISE))
        if process.discrete:
            self.traced = lookup(self.table, NAMES[: self.table.shape[1]])
        self._conversions: dict[Prediction, Program] = {}

    def program(self, of_noise: bool = False) -> Program | None:
        """The program that computes the coefficients ``NAMES`` of this objective from t; None if the formulas are
        evaluated (``why`` says why).

        Args:
            of_noise: only alpha and sigma are needed. They may have a program where the others have none.
        """
        traced = self.traced
        if isinstance(traced, Program):
            return traced
        found = traced.program()
        return self.traced_noise.program() if found is None and of_noise else found

    @property
    def why(self) -> str:
        """Why there is no program; empty where there is one."""
        return "" if isinstance(self.traced, Program) else self.traced.why

    def _trace(self, names: tuple[str, ...]) -> Program:
        process = self.process

        def formula(t: Tensor) -> dict[str, Tensor]:
            levels = Levels(t, *process.alpha_sigma(t), process)
            found = self._formula(names[0], levels) if names == OF_NOISE else self.formulas(levels)
            return {name: found[name] for name in names if name in found}

        return trace(formula, process.t_min, process.t_max)

    def formulas(self, levels: Levels) -> dict[str, Tensor]:
        """All coefficients at ``levels``: float64 of their shape, by name. There is no c if the error function has
        none."""
        return {
            name: row for first in ("alpha", "p", "scale", "c") for name, row in self._formula(first, levels).items()
        }

    def _formula(self, name: str, levels: Levels) -> dict[str, Tensor]:
        """The coefficient ``name``, and others that are computed along with it, by name."""
        if name in OF_NOISE:
            return {"alpha": levels.alpha, "sigma": levels.sigma}
        if name in ("p", "q"):
            return dict(zip(("p", "q"), self.prediction.coefficients(levels)))
        if name == "scale":
            return {"scale": kinds.conversion(self.prediction, self.error_space, levels)[1]}
        c, factor = self.loss.rows(levels)
        weight = weightings.evaluate(self.weighting, levels, self.error_space)
        rows = {
            "weight": weight,
            "loss_weight": weight if isinstance(factor, float) and factor == 1 else weight * factor,
        }
        return rows if c is None else rows | {"c": c}

    def rows(self, name: str, t: Tensor, dtype: torch.dtype, backend: Any) -> dict[str, Any]:
        """The coefficient ``name``, and others that are computed along with it, at the times ``t``: tensors shaped as
        ``t``, computed in float64 and rounded to ``dtype`` once."""
        names = self.used if name in self.used else (name,)
        if not torch.compiler.is_compiling():
            program = self.program(name in OF_NOISE)
            if program is not None:
                part = program.of(*names) if program.index else program
                rows = backend.evaluate(part, t, dtype)
                if rows is not None:
                    return dict(zip(part.names, rows))
        elif self.table is not None:
            columns = [NAMES.index(name) for name in names]
            return dict(zip(names, gather_rows(self.table[:, columns].to(t.device, dtype), t).unbind(-1)))
        levels = self.process.levels(t)
        return {key: row.to(dtype) for key, row in self._formula(name, levels).items()}

    def conversion(self, kind: Prediction) -> Program | None:
        """The program of (k_x, k_m), which convert the network's output to ``kind``. None for a continuous process, and
        while torch.compile traces."""
        if self.table is None or torch.compiler.is_compiling():
            return None
        found = self._conversions.get(kind)
        if found is None:
            with lasting():
                levels = self.process.levels(torch.arange(self.process.steps, device="cpu"))
                table = torch.stack(kinds.conversion(self.prediction, kind, levels), -1)
                found = self._conversions[kind] = lookup(table, ("k_x", "k_m"))
        return found

    def _checked_table(self) -> Tensor:
        levels = self.process.levels(torch.arange(self.process.steps, device="cpu"))
        rows = self.formulas(levels)
        if self.error_space is not self.prediction and not bool(rows["scale"].isfinite().all()):
            t = (~rows["scale"].isfinite()).nonzero()[0].item()
            raise ValueError(
                f"an error of {self.prediction.name!r} is no finite error of {self.error_space.name!r} at t = {t} "
                f"(SNR {levels.snr[t].item():g}): use another prediction or error_space."
            )
        if bool(rows["weight"].isnan().any()):
            t = rows["weight"].isnan().nonzero()[0].item()
            raise ValueError(f"the weighting {self.weighting!r} is NaN at t = {t} (SNR {levels.snr[t].item():g}).")
        dropped = weightings.infinite(self.weighting, levels, self.error_space).nonzero().flatten().tolist()
        if dropped:
            warn(
                f"the weighting {self.weighting!r} is infinite at t = {dropped[:3]}{'...' if dropped[3:] else ''}: "
                f"these timesteps get weight 0 and are left out of the loss."
            )
        return torch.stack([rows[name] for name in NAMES if name in rows], -1)


def drawn(timesteps: Timesteps, process: Process) -> Traced:
    """The program that makes a time of ``process`` from a uniform."""

    return Traced((timesteps, process), partial(_trace_times, timesteps, process))


def _trace_times(timesteps: Timesteps, process: Process) -> Program:
    return trace(lambda u: {"t": timesteps(u, process)}, *_ENDS, integers=("t",) if process.discrete else ())


class Rows:
    """Coefficients at the times of a batch, placed to broadcast to the data: one attribute for each of ``NAMES``, which
    is computed when it is first asked for.

    Args:
        coefficients: the ``Coefficients`` of the objective.
        t: the times, checked.
        x0: the data, [batch, ...].
        dtype: the dtype of the coefficients.
        backend: the backend that computes them.
        at_hand: coefficients that a fast call has computed already, float32 [names of ``program``, batch]; or None.
        program: the program that computed them.
    """

    def __init__(
        self,
        coefficients: Coefficients,
        t: Tensor,
        x0: Tensor,
        dtype: torch.dtype,
        backend: Any,
        program: Program | None = None,
        at_hand: Tensor | None = None,
    ):
        self.coefficients, self.dtype, self.program, self.at_hand = coefficients, dtype, program, at_hand
        self._how = x0.shape, backend
        self._t, self.version = t, version_of(t)

    def _learn(self, known: dict[str, Any]) -> None:
        if wrapping() is not None:  # these are of a transform, and mean nothing after it
            return
        for name, row in known.items():  # one by one: an update of __dict__ is not traced by every PyTorch
            setattr(self, name, row)

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(name)
        if not torch.compiler.is_compiling() and self.version != version_of(self._t):
            raise RuntimeError(CHANGED.format("t"))
        shape, backend = self._how
        if self.at_hand is not None and name in self.program.names:
            return self.at_hand[self.program.names.index(name)].view(-1, *(1,) * (len(shape) - 1))
        found = self.coefficients.rows(name, place_rows("t", self._t, shape), self.dtype, backend)
        self._learn(found)
        return found[name]
