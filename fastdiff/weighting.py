"""Loss weightings: one float64 weight a row, multiplying the squared error of the prediction.

Papers state a weighting on the error of x0, of epsilon or of whatever the network predicts. Each weighting here says
which (``on``), and ``evaluate`` carries it over to the error at hand: an error e of one kind is k e of another, so the
weight is multiplied by k^2. Min-SNR's three published forms, for example, are one formula, min(SNR, gamma) on x0.

Zero and infinite SNR: a weight takes its limit there (min(S, gamma) / S is 1 at S = 0). Where the limit is infinite,
or beyond float32, no finite number is right: the weight is 0 and the row is left out of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import prediction as kinds
from .names import find
from .numeric import check_fields, check_numbers
from .prediction import Prediction
from .process import Levels, as_float64, check_by
from .showing import brief, brief_fields
from .tensors import cached, gather_rows, value_checks_are_free

# A level of exactly 0 is replaced by these two, and the limit read off the two weights. They are far below any real
# level, and their powers up to the sixth stay within float64.
_TINY, _LESS_TINY = 1e-50, 1e-40


class Weighting:
    """Base of the weightings: ``formula`` gives the weights, ``on`` the kind of error they multiply."""

    def __post_init__(self):
        check_fields(self)

    def on(self, prediction: Prediction) -> Prediction:
        """The kind of prediction on whose squared error the formula is stated."""
        return prediction

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        """float64 weights of the levels' shape. No level is exactly 0 here: see ``evaluate``."""
        raise NotImplementedError


class _OnX0(Weighting):
    def on(self, prediction: Prediction) -> Prediction:
        return kinds.SAMPLE


@dataclass(frozen=True)
class Uniform(Weighting):
    """1: the plain error of the prediction (L_simple of Ho et al. 2020 for epsilon)."""

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        return torch.ones_like(levels.alpha)


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(S, gamma) on the error of x0: min(S, gamma) / S for epsilon, / (S + 1) for v (Hang et al. 2023).

    ``form`` names what else goes under this name for v_prediction: "plus_one" is min(S, gamma) / S + 1 (several
    diffusers scripts), "shifted" min(S + 1, gamma) / (S + 1), "epsilon" min(gamma / S, 1), the weight of epsilon's
    error. Other predictions are the same in every form.
    """

    gamma: float = 5.0
    form: str = "paper"

    def __post_init__(self):
        super().__post_init__()
        _positive("gamma", self.gamma)
        _one_of("form", self.form, ("paper", "plus_one", "shifted", "epsilon"))

    def unused(self, prediction: Prediction, error_space: Prediction) -> str | None:
        """A sentence for a warning if a setting of the weighting has no effect on an objective of these kinds;
        otherwise None."""
        if not self._own_form(prediction) or self._own_form(error_space):
            return None
        return (
            f"MinSNR(form={self.form!r}) has no effect with error_space={error_space.name!r}: it is a form for errors "
            f"of v_prediction, and all others have the same."
        )

    def _own_form(self, prediction: Prediction) -> bool:
        return prediction.name == "v_prediction" and self.form != "paper"

    def on(self, prediction: Prediction) -> Prediction:
        return prediction if self._own_form(prediction) else kinds.SAMPLE

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        snr = levels.snr
        if not self._own_form(prediction):
            return snr.clamp(max=self.gamma)
        if self.form == "plus_one":
            return snr.clamp(max=self.gamma) / snr + 1
        if self.form == "epsilon":
            return (self.gamma / snr).clamp(max=1)
        return (snr + 1).clamp(max=self.gamma) / (snr + 1)


@dataclass(frozen=True)
class SoftMinSNR(_OnX0):
    """S gamma / (S + gamma) on the error of x0 (Crowson et al. 2024). gamma = 1 / sigma_data^2 is k-diffusion's."""

    gamma: float = 5.0

    def __post_init__(self):
        super().__post_init__()
        _positive("gamma", self.gamma)

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        # gamma / (1 + gamma / S): no infinity over infinity at S = inf.
        return self.gamma / (1 + self.gamma / levels.snr)


@dataclass(frozen=True)
class TruncatedSNR(_OnX0):
    """max(S, 1) on the error of x0 (Salimans and Ho 2022)."""

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        return levels.snr.clamp(min=1)


@dataclass(frozen=True)
class SNR(Weighting):
    """S^power on the prediction's own error; power = -1 is 1 / S."""

    power: float = 1.0

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        return levels.snr**self.power


@dataclass(frozen=True)
class P2(Weighting):
    """(k + S)^-gamma on the prediction's own error (Choi et al. 2022). ``k=None``: 1, and 2 for v_prediction."""

    gamma: float = 1.0
    k: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.k is not None and not self.k >= 0:
            raise ValueError(f"k must be at least 0, or None; got {self.k!r}.")

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        k = self.k if self.k is not None else 2.0 if prediction.name == "v_prediction" else 1.0
        return (k + levels.snr) ** -self.gamma


@dataclass(frozen=True)
class Debiased(Weighting):
    """1 / sqrt(c) on the error of epsilon, c = min(S, cap) (Yu et al. 2024).

    For v_prediction two forms are in use: ``v_form="reciprocal"`` 1 / (c + 1), ``"reciprocal_sqrt"`` 1 / sqrt(c + 1).
    """

    cap: float = 1000.0
    v_form: str = "reciprocal"

    def __post_init__(self):
        super().__post_init__()
        _positive("cap", self.cap)
        _one_of("v_form", self.v_form, ("reciprocal", "reciprocal_sqrt"))

    def on(self, prediction: Prediction) -> Prediction:
        return prediction if prediction.name == "v_prediction" else kinds.EPSILON

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        capped = levels.snr.clamp(max=self.cap)
        if prediction.name != "v_prediction":
            return capped**-0.5
        return (capped + 1) ** (-1.0 if self.v_form == "reciprocal" else -0.5)


@dataclass(frozen=True)
class InverseAlphaBar(Weighting):
    """1 / alpha_bar = 1 / alpha^2 on the prediction's own error."""

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        return levels.alpha**-2


@dataclass(frozen=True)
class EDMWeighting(_OnX0):
    """(sigma^2 + d^2) / (sigma d)^2 on the error of x0, so 1 for the prediction "edm" (Karras et al. 2022, table 1).

    sigma is sigma / alpha for processes that scale x0. ``sigma_data=None`` takes the process's own d, or 0.5.
    """

    sigma_data: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.sigma_data is not None:
            _positive("sigma_data", self.sigma_data)

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        d = self.sigma_data
        if d is None:
            d = levels.process.sigma_data
        return 1 / d**2 + levels.snr


@dataclass(frozen=True)
class SigmaSqrt(Weighting):
    """sigma^-2 on the prediction's own error: SD3's "sigma_sqrt", and CogVideoX's 1 / (1 - alpha_bar)."""

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        return levels.sigma**-2


@dataclass(frozen=True)
class CosMap(Weighting):
    """2 / (pi (1 - 2 sigma + 2 sigma^2)) on the prediction's own error (Esser et al. 2024)."""

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        return 2 / (math.pi * (1 - 2 * levels.sigma + 2 * levels.sigma**2))


@dataclass(frozen=True)
class SigmaLinear(Weighting):
    """1 + slope sigma on the prediction's own error: NeMo's for flows, with the flow's shift as the slope."""

    slope: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.slope < math.inf:
            raise ValueError(f"slope must be a number of at least 0; got {self.slope!r}.")

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        return 1 + self.slope * levels.sigma


@dataclass(frozen=True)
class Bell(Weighting):
    """A bell ("bsmntw") with mean 1: y = exp(-2 (s - 1/2)^2) less its least, exp(-1/2), over the mean of that.

    ``by="fraction"``: s is the time as a fraction of the process; of a discrete one the mean is that of its steps, so
    that its table is (y - min) steps / sum. ``by="sigma"``: s is the noise level, in [0, 1], as trainers of shifted
    flows have it.
    """

    by: str = "fraction"

    def __post_init__(self):
        super().__post_init__()
        check_by(self.by)

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        if self.by == "fraction" and levels.process.discrete:
            steps = levels.process.steps
            t = torch.arange(steps, dtype=levels.alpha.dtype, device=levels.t.device)
            y = torch.exp(-2 * (t / steps - 0.5) ** 2)
            y = y - y.min()
            return gather_rows((y * (steps / y.sum())).unsqueeze(-1), levels.t).squeeze(-1)
        if levels.process.t_is_sigma:
            raise ValueError(f"Bell needs a time or a sigma in [0, 1]; got {levels.process!r}.")
        least, mean = math.exp(-0.5), math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5))
        return (torch.exp(-2 * (levels.measured(self.by) - 0.5) ** 2) - least) / (mean - least)


@dataclass(frozen=True, eq=False)
class PerTimestep(Weighting):
    """A table of one weight per timestep of a discrete process, on the prediction's own error. It is copied: what is
    written into it later changes nothing. For continuous processes there is ``Interpolated``."""

    table: Tensor
    __repr__ = brief_fields

    def __post_init__(self):
        super().__post_init__()
        table = as_float64(self.table).detach().clone()
        if table.ndim != 1:
            raise ValueError(f"PerTimestep needs a 1-D table, one weight a timestep; got shape {tuple(table.shape)}.")
        object.__setattr__(self, "table", table)

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        steps = _discrete_steps(self, levels)
        if len(self.table) != steps:
            raise ValueError(f"PerTimestep has {len(self.table)} weights, but {levels.process!r} has {steps} steps.")
        return gather_rows(self.table.to(levels.t.device).unsqueeze(-1), levels.t).squeeze(-1)


@dataclass(frozen=True, eq=False)
class Interpolated(Weighting):
    """Weights [K], K >= 2, at equally spaced places in [0, 1], the first at 0 and the last at 1, and straight lines
    between them; on the prediction's own error. The table is copied: what is written into it later changes nothing.

    ``by="fraction"``: a place is the time as a fraction of the process, 0 for clean data; ``by="sigma"``: the noise
    level, in [0, 1], as trainers of shifted flows have it.
    """

    table: Tensor
    by: str = "fraction"
    __repr__ = brief_fields

    def __post_init__(self):
        super().__post_init__()
        check_by(self.by)
        table = as_float64(self.table).detach().clone()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(
                f"Interpolated needs a 1-D table of at least two weights, at 0 and at 1; got shape "
                f"{tuple(table.shape)}."
            )
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "_tables", {})  # of each device

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        if levels.process.t_is_sigma:
            raise ValueError(f"Interpolated needs a time or a sigma in [0, 1]; got {levels.process!r}.")
        device, wide = levels.alpha.device, levels.alpha.dtype
        table = cached(self._tables, device, lambda: self.table.to(device, wide))
        return interpolate(table, levels.measured(self.by))


def interpolate(table: Tensor, place: Tensor) -> Tensor:
    """The entries [K] of a table, K >= 2, which stand at equally spaced places from 0 to 1, with straight lines between
    them: at float64 places in [0, 1] of any shape. The shape of ``place``; differentiable in both."""
    at = place * (len(table) - 1)
    below = at.detach().floor().long().clamp(0, len(table) - 2)
    return torch.lerp(table[below].to(at.dtype), table[below + 1].to(at.dtype), at - below)


@dataclass(frozen=True)
class Likelihood(Weighting):
    """g(t)^2 on the error of the score: the likelihood weighting of Song et al. 2021. Processes with a
    ``diffusion_squared``.

    With t drawn by ``fastdiff.timesteps.UniformLogSNR`` it is a constant instead, on the error of the noise.
    """

    def on(self, prediction: Prediction) -> Prediction:
        return kinds.get("score")

    def formula(self, levels: Levels, prediction: Prediction) -> Tensor:
        if not hasattr(levels.process, "diffusion_squared"):
            raise ValueError(
                f"Likelihood needs a process with g(t)^2 (VPSDE, VESDE, SubVPSDE, TrigFlow, Cosine); got "
                f"{levels.process!r}."
            )
        return levels.process.diffusion_squared(levels.t)


_NAMES = {
    "uniform": Uniform,
    "min_snr": MinSNR,
    "soft_min_snr": SoftMinSNR,
    "truncated_snr": TruncatedSNR,
    "snr": SNR,
    "p2": P2,
    "debiased": Debiased,
    "inverse_alpha_bar": InverseAlphaBar,
    "edm": EDMWeighting,
    "sigma_sqrt": SigmaSqrt,
    "sigma_linear": SigmaLinear,
    "cosmap": CosMap,
    "bell": Bell,
    "likelihood": Likelihood,
}
WeightingLike = Weighting | Callable[[Levels], Tensor] | str | None


def get(weighting: WeightingLike) -> Weighting | Callable[[Levels], Tensor]:
    """A weighting from its name, itself, any callable of the levels, or None (uniform)."""
    if weighting is None:
        return Uniform()
    if isinstance(weighting, str):
        return find("weighting", weighting, _NAMES, {"none": "uniform", "bsmntw": "bell"}, "an object")()
    if isinstance(weighting, Tensor):
        raise TypeError(
            f"weighting is a {brief(weighting)}: a table of one weight a timestep is PerTimestep(table); one over the "
            f"times of a continuous process Interpolated(table)."
        )
    if isinstance(weighting, type) or not (isinstance(weighting, Weighting) or callable(weighting)):
        raise TypeError(
            f"weighting must be None, a name, a fastdiff weighting such as MinSNR(5.0) or a callable of the levels; "
            f"got {brief(weighting)}."
        )
    return weighting


def adaptive(errors: Tensor, c: float = 0.01, p: float = 1.0) -> Tensor:
    """1 / sg(S + c)^p, sg being stop-gradient: adaptive weights of errors S, one a row (Geng et al. 2025, MeanFlow).

    MeanFlow's S is the *sum* of a row's squared errors, while ``reduction="none"`` gives their mean: multiply it by the
    elements of a row, or c means something else::

        rows = objective.loss(output, noised, reduction="none") * output[0].numel()
        loss = (fastdiff.weighting.adaptive(rows) * rows).mean()

    Args:
        errors: floating point, of any shape, at least 0.
        c: what is added, > 0: the weight of a row without error is c^-p.
        p: how much of an error's size is taken away: 0 nothing, 1/2 gives about its root, 1 counts all rows alike.

    Returns the weights, shaped and typed as errors, without a gradient. Raises ValueError for unfit c and p, TypeError
    for integer errors.
    """
    check_numbers(c=c, p=p)
    _positive("c", c)
    if not isinstance(errors, Tensor) or not errors.is_floating_point():
        raise TypeError(f"errors must be a floating-point tensor, one a row; got {brief(errors)}.")
    if not 0 <= p < math.inf:
        raise ValueError(f"p must be a number of at least 0; got {p!r}.")
    return ((as_float64(errors.detach()) + c) ** -p).to(errors.dtype)


def check(weighting: Weighting | Callable[[Levels], Tensor], levels: Levels) -> None:
    """Raise TypeError for a callable that takes the levels for t."""
    if isinstance(weighting, Weighting):
        return
    try:
        weighting(levels)
    except Exception as error:
        if "Levels" not in str(error):
            raise
        raise TypeError(
            "a weighting is called with the noise levels, not with t: write, for example, "
            "lambda levels: 1 / (1 + levels.t), or use levels.snr, levels.alpha, levels.sigma."
        ) from error


def evaluate(weighting: WeightingLike, levels: Levels, prediction: str | Prediction) -> Tensor:
    """The float64 weights, of the levels' shape, of the squared error of ``prediction`` (see the module's policy).

    Raises ValueError if the weighting returns another shape.
    """
    if weighting is None or isinstance(weighting, Uniform):
        return torch.ones_like(levels.alpha)
    weight = _limits(weighting, levels, prediction)
    return torch.where(_too_large(weight), torch.zeros_like(weight), weight)


def infinite(weighting: WeightingLike, levels: Levels, prediction: str | Prediction) -> Tensor:
    """Where the weight is infinite, and ``evaluate`` therefore gives 0: bool, of the levels' shape."""
    return _too_large(_limits(weighting, levels, prediction))


def _too_large(weight: Tensor) -> Tensor:
    return weight.abs() > torch.finfo(torch.float32).max


def _limits(weighting: WeightingLike, levels: Levels, prediction: str | Prediction) -> Tensor:
    weighting, prediction = get(weighting), kinds.get(prediction)
    edge = (levels.alpha == 0) | (levels.sigma == 0)
    weight = _at_least(_TINY, weighting, levels, prediction)
    if value_checks_are_free(edge) and not bool(edge.any()):
        return weight
    before = _at_least(_LESS_TINY, weighting, levels, prediction)
    grows, falls = weight.abs() > before.abs() * (1 + 1e-6), weight.abs() < before.abs() * (1 - 1e-6)
    limit = torch.where(grows, weight.sign() * torch.inf, torch.where(falls, 0.0, weight))
    return torch.where(edge, limit, weight)


def _at_least(tiny: float, weighting: Weighting | Callable, levels: Levels, prediction: Prediction) -> Tensor:
    levels = replace(levels, alpha=levels.alpha.clamp(min=tiny), sigma=levels.sigma.clamp(min=tiny))
    if isinstance(weighting, Weighting):
        weight = weighting.formula(levels, prediction)
        on = weighting.on(prediction)
        return weight if on is prediction else weight * kinds.conversion(prediction, on, levels)[1] ** 2
    weight = as_float64(weighting(levels)).to(levels.alpha.device)
    if weight.shape != levels.alpha.shape:
        raise ValueError(
            f"the weighting returned shape {tuple(weight.shape)}; one weight a row is needed: "
            f"{tuple(levels.alpha.shape)}."
        )
    return weight


def _discrete_steps(weighting: Weighting, levels: Levels) -> int:
    if not levels.process.discrete:
        raise ValueError(
            f"{type(weighting).__name__} needs a discrete process; got {levels.process!r}: use Interpolated(table)."
        )
    return levels.process.steps


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive; got {value!r}.")


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}.")
