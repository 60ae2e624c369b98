"""The plan of a sampling run: the times, and the step table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import prediction as kinds
from ..numeric import check_fields
from ..ops.step import COLUMNS
from ..ops.step_table import PreparedSteps
from ..prediction import Prediction
from ..process import Levels, Process
from ..showing import brief_fields


@dataclass(frozen=True, repr=False)
class Plan:
    """All that a sampler decides before the first step. A row of the step table is one call of the network; a method
    that calls it twice a step (Heun) has two rows a step.

    Attributes:
        times: the process's t of each row, [S].
        table: float64 [S, len(fastdiff.ops.COLUMNS)] on the CPU.
        draws: whether a row adds noise; the others draw none.
        model_scale: factor on x before the network sees it, float64 [S], or None for 1.
        model_time: the time that the network is called with, [S]: the same numbers as in training.
        initial_std: standard deviation of the noise that sampling starts from.
        learned_variance: the network returns twice the channels: prediction, then variance.
        clip: the bound of the x0 estimate, or None.
        start: (factor, noise): x becomes factor x + noise z before the first row (churn). The noise that a row adds
            then belongs to the step after it. None leaves x as it is.
        steps: the number of the step that each row belongs to; None: one row a step.
        gradient: float64 [S], the factor of a classifier's gradient of log p(y | x_t). The product is added to the
            network's output (Dhariwal and Nichol 2021, algorithm 2).
        gradient_of_mean: add the product to the result of the step instead (algorithm 1).
        langevin: for each row that is a Langevin step (``PredictorCorrector``), its size where the score s and the
            noise z are of one length: it is multiplied by (abs(z) / abs(s))^2 of each sample. The row has s = c_x x +
            c_m m and c_noise = 1. 0 for other rows; None if there are none.
    """

    times: Tensor
    table: Tensor
    draws: tuple[bool, ...]
    model_scale: Tensor | None
    model_time: Tensor
    initial_std: float
    learned_variance: bool = False
    clip: float | None = None
    start: tuple[float, float] | None = None
    steps: tuple[int, ...] | None = None
    gradient: Tensor | None = None
    gradient_of_mean: bool = False
    langevin: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        steps = len(self.times) if self.steps is None else 1 + self.steps[-1]
        times = f"t from {self.times[0]:g} to {self.times[-1]:g}" if len(self.times) else "no times"
        return f"Plan({steps} steps, {len(self.times)} calls of the network, {sum(self.draws)} draws, {times})"

    @cached_property
    def rows(self) -> PreparedSteps:
        """The step table, which is placed on a device once for all runs."""
        return PreparedSteps(self.table)


class Sampler:
    """Base of the samplers: ``plan`` makes the table."""

    def __init_subclass__(cls, **options: object):
        super().__init_subclass__(**options)
        if "__repr__" not in vars(cls):  # a dataclass would write one of its own, with every field
            cls.__repr__ = brief_fields  # type: ignore[assignment]

    def __post_init__(self):
        check_fields(self)

    def _freeze(self, *names: str) -> None:
        """Replace fields that are tensors or lists by tuples of their numbers. So a later write into the tensor does
        not change the sampler."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                value = value.tolist()
            elif hasattr(value, "__array__"):
                value = torch.as_tensor(value).tolist()
            if value is not None and not isinstance(value, range) and not (name == "sigmas" and isinstance(value, str)):
                if isinstance(value, str) or not hasattr(value, "__iter__"):
                    raise TypeError(f"{name} must be numbers, the noisiest first; got {value!r}.")
                object.__setattr__(self, name, tuple(value))

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        """The plan of a run. Raises ValueError for a combination that means nothing."""
        raise NotImplementedError


def x0_rows(prediction: Prediction, levels: Levels) -> tuple[Tensor, Tensor]:
    """The columns (p_x, p_m) of the x0 estimate at every level, [S] each. Raises ValueError where the prediction does
    not determine x0."""
    p_x, p_m = kinds.conversion(prediction, kinds.SAMPLE, levels)
    finite = p_x.isfinite() & p_m.isfinite()
    if not bool(finite.all()):
        t = levels.t[~finite][0].item()
        raise ValueError(
            f"{prediction.name!r} does not determine x0 at t = {t} of {levels.process!r} (zero SNR): use a network "
            f"with prediction 'v_prediction' or 'sample', or timesteps that begin later."
        )
    return p_x, p_m


def build_plan(
    prediction: Prediction,
    levels: Levels,
    ends: tuple[Tensor, Tensor],
    draws: tuple[bool, ...],
    columns: dict[str, Tensor],
    std: float | None = None,
    **rest: object,
) -> Plan:
    """The plan of rows that are at ``levels`` and go to the levels (alpha, sigma) of ``ends``, [S] each.

    The columns that follow from the levels are filled in: the x0 estimate, the network's input and time, the known data
    of inpainting.
    """
    p_x, p_m = x0_rows(prediction, levels)
    scale, time = kinds.model_input(prediction, levels)
    columns = {"p_x": p_x, "p_m": p_m, "k_x0": ends[0], "k_n": ends[1]} | columns
    columns["c_in"] = torch.ones_like(p_x) if scale is None else torch.cat([scale[1:], torch.ones_like(scale[:1])])
    table = build_table(len(levels.t), **columns)
    gradient = rest.pop("gradient", None)
    if gradient is None:
        # The noise estimate moves by -sigma gradient (Dhariwal and Nichol 2021, algorithm 2): by what the output does.
        gradient = -levels.sigma / kinds.conversion(prediction, kinds.EPSILON, levels)[1]
        gradient = torch.where(gradient.isfinite(), gradient, 0.0)
    std = initial_std(levels) if std is None else std
    return Plan(levels.t, table, draws, scale, time, std, gradient=gradient, **rest)  # type: ignore[arg-type]


def build_table(steps: int, device: torch.device | str = "cpu", **columns: Tensor | float) -> Tensor:
    """float64 [steps, len(COLUMNS)] on the device of the columns; a column that is not named is 0."""
    zero = torch.zeros(steps, dtype=torch.float64, device=device)
    unknown = set(columns) - set(COLUMNS)
    assert not unknown, unknown
    return torch.stack([columns[name] + zero if name in columns else zero for name in COLUMNS], -1)


def following(levels: Levels, last: tuple[float, float] = (1.0, 0.0)) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the level each step goes to: the next one's, and ``last`` (clean data) for the last."""
    end = torch.tensor(last, dtype=levels.alpha.dtype, device="cpu")
    return torch.cat([levels.alpha[1:], end[:1]]), torch.cat([levels.sigma[1:], end[1:]])


def initial_std(levels: Levels) -> float:
    """Standard deviation of x at the first level: 1 where the process preserves variance, its sigma elsewhere."""
    return 1.0 if levels.process.variance_preserving else float(levels.sigma[0])
