"""Diffusion processes: the (alpha, sigma) of ``x_t = alpha * x0 + sigma * n`` as float64 functions of the time t."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .names import answers_keywords, find, plainly
from .numeric import check_numbers
from .showing import brief
from .sigma_schedules import karras
from .tensors import cached, gather_rows, value_checks_are_free

# Where a posterior variance of zero must have a logarithm (Improved DDPM's and diffusers' floor).
MIN_VARIANCE = 1e-20

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_float64(value: Any) -> Tensor:
    """``value`` as a float64 tensor (float32 on a device that has no float64, such as Apple's MPS)."""
    if not isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=torch.float64, device="cpu")  # no detour through the default dtype
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def as_times(t: Any, device: torch.device | str | None = None) -> Tensor:
    """``t`` (tensor, number or list) as a tensor of its own kind, integer or floating point, on ``device``."""
    if not isinstance(t, Tensor):
        try:
            kind = torch.as_tensor(t, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"t must be a tensor, a number or a list of numbers; got {brief(t)}.") from error
        t = as_float64(t) if kind.is_floating_point() else kind
    return t.to(device) if device is not None else t


@dataclass(frozen=True, eq=False)
class Levels:
    """Noise levels: one entry a row, all of the shape of ``t``.

    ``alpha`` and ``sigma`` are float64; ``x_t = alpha * x0 + sigma * n`` with n standard normal.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    process: Process

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio (alpha / sigma)^2, float64; 0 and infinity where a level is pure noise or clean."""
        return (self.alpha / self.sigma) ** 2

    @property
    def fraction(self) -> Tensor:
        """How far the process has gone, 0 (clean) to 1 (noise): t / steps, or t itself for processes on [0, 1]."""
        return self.process.fraction(self.t)

    def measured(self, by: str) -> Tensor:
        """How far it has gone in [0, 1], float64: ``fraction`` (of a shifted flow before the shift) or "sigma".

        Raises ValueError for the sigma of a process that reaches beyond 1.
        """
        if by == "fraction":
            return self.fraction
        if not (self.process.variance_preserving or self.process.straight):
            raise ValueError(f"by='sigma' needs a process whose sigma lies in [0, 1]; got {self.process!r}.")
        return self.sigma


def check_by(by: str) -> None:
    """Raise ValueError unless ``by`` is a way to say how far a process has gone (``Levels.measured``)."""
    if by not in ("fraction", "sigma"):
        raise ValueError(f"by must be 'fraction' or 'sigma'; got {by!r}.")


def transition(
    alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Gaussian q(x_s | x_t, x0) of a level s less noisy than t, for any Gaussian process.

    Returns float64 ``(c_x0, c_xt, variance, forward_variance)``: mean = c_x0 x0 + c_xt x_t, the variance, and that of
    q(x_t | x_s), which for consecutive steps of DDPM is beta_t. Kingma et al. 2021 (Variational Diffusion Models),
    appendix A.2; with ``alpha = sqrt(alpha_bar)`` it is Ho et al. 2020 (DDPM), equations 6 and 7.
    """
    # The ratio of the two SNRs keeps its digits where 1 - alpha_bar_t / alpha_bar_s would cancel.
    removed = 1 - (alpha_t * sigma_s / (sigma_t * alpha_s)) ** 2
    return alpha_s * removed, alpha_t / alpha_s * (sigma_s / sigma_t) ** 2, sigma_s**2 * removed, sigma_t**2 * removed


class Process:
    """Base of all processes. A subclass gives ``alpha_sigma`` and says what its time t is.

    Attributes:
        discrete: t is an integer index in [0, steps - 1]; otherwise a float in [t_min, t_max].
        steps: the number of timesteps, of discrete processes.
        variance_preserving: x_t of unit-variance data keeps unit variance, so sampling starts from a standard normal.
        straight: x_t lies on a straight line from the data to the noise, and sigma, in [0, 1], is the noise's factor.
        noisiest_last: of a discrete process, that its timesteps count up from clean data to noise.
        t_is_sigma: the time t is the noise level sigma itself.
        sigma_data: the standard deviation of the data that preconditioning reckons with.
        data_at: the t of clean data: 0, or 1 where t runs from noise, 0, to data, 1.
    """

    discrete = False
    steps: int
    variance_preserving = straight = noisiest_last = t_is_sigma = False
    sigma_data = 0.5
    t_min, t_max = 0.0, 1.0
    data_at = 0
    _changes = 0  # counts what is set, so that what was made from a process is made anew

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        super().__setattr__("_changes", self._changes + 1)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``t`` (any shape, already checked): float64 tensors of t's shape and device."""
        raise NotImplementedError

    def levels(self, t: Any) -> Levels:
        """The noise levels at ``t`` (tensor, number or list). Raises TypeError or ValueError as ``check_t``."""
        t = as_times(t)
        self.check_t(t)
        alpha, sigma = self.alpha_sigma(t)
        return Levels(t, alpha, sigma, self)

    def has_levels_of(self, other: Process) -> bool:
        """Whether the noise levels are those of ``other`` at every t (for continuous ones: at 33 times)."""
        if self is other:
            return True
        if self.discrete != other.discrete or (self.t_min, self.t_max) != (other.t_min, other.t_max):
            return False
        if self.discrete and self.steps != other.steps:
            return False
        if self.discrete:
            t = torch.arange(self.steps, device="cpu")
        else:
            inside = torch.linspace(0.01, 0.99, 33, dtype=torch.float64, device="cpu")
            t = self.t_min + inside * (min(self.t_max, 100.0) - self.t_min)
        return all(torch.equal(a, b) for a, b in zip(self.alpha_sigma(t), other.alpha_sigma(t)))

    def fraction(self, t: Tensor) -> Tensor:
        """How far the process has gone at t, 0 for clean data (or ``t_min``) and 1 for noise. float64."""
        t = self._turned(as_float64(t))
        return t if (self.t_min, self.t_max) == (0, 1) else (t - self.t_min) / (self.t_max - self.t_min)

    def time(self, fraction: Tensor) -> Tensor:
        """The inverse of ``fraction``: the process's own t for float64 fractions in [0, 1]."""
        return self.time_at(self._turned(fraction))

    def time_at(self, part: Tensor) -> Tensor:
        """The process's own t for float64 parts in [0, 1] of its time, 0 for its least t and 1 for its greatest (for
        tables of another library, clean and noise): densities of t are stated in these."""
        if (self.t_min, self.t_max) == (0, 1):
            return part
        return self.t_min + (self.t_max - self.t_min) * part

    def _turned(self, t: Tensor) -> Tensor:
        """t in [0, 1] as counted from the data; and from that t again."""
        return 1 - t if self.data_at else t

    def model_time(self, levels: Levels) -> Tensor:
        """The time that a network is called with, shaped as t (unless its prediction is preconditioned): t by
        default."""
        return levels.t

    def grid(self, steps: int) -> Tensor:
        """The times [steps] that a sampler visits in so many steps, the noisiest first: as ``check_t`` takes them.

        Raises ValueError for a process of which none is known.
        """
        raise ValueError(f"no time grid is known for {self!r}: give the sampler its timesteps.")

    def levels_at(self, sigma: Any) -> Levels:
        """The levels of given noise, as sigma schedules of samplers state it: sigma / alpha, finite; for RectifiedFlow
        the factor of the noise itself, in [0, 1]. t is floating point, for discrete processes between the timesteps.

        Raises ValueError for a sigma that is negative, infinite or NaN, or beyond what the process reaches.
        """
        sigma = as_float64(sigma)
        if not bool(((sigma >= 0) & sigma.isfinite()).all()):
            raise ValueError(
                f"sigma must be finite and at least 0; got {_first(sigma[~(sigma >= 0) | sigma.isinf()])}."
            )
        return Levels(self._time_at(sigma), *self._alpha_sigma_at(sigma), self)

    def time_of(self, sigma: Any) -> Tensor:
        """The t, float64, at which a continuous process has the noise ``sigma`` (number, list or tensor): as in
        ``levels_at``. Raises ValueError, on the CPU, for a sigma that it does not have, and for a discrete process.
        """
        if self.discrete:
            raise ValueError(f"{self!r} has the noise levels of its timesteps and no other sigma: pass t.")
        sigma = as_float64(sigma)
        t = self._time_at(sigma)
        if value_checks_are_free(sigma):
            inside = sigma.isfinite() & (sigma >= 0) & (t >= self.t_min - 1e-9) & (t <= self.t_max + 1e-9)
            if not bool(inside.all()):
                raise ValueError(f"{self!r} has no noise level sigma = {_first(sigma[~inside])}.")
        return t.clamp(self.t_min, self.t_max)

    def sigma_of_ratio(self, ratio: Tensor) -> Tensor:
        """The sigma that ``levels_at`` and ``time_of`` take, of float64 ratios sigma / alpha."""
        return ratio

    def _time_at(self, sigma: Tensor) -> Tensor:
        raise ValueError(f"{self!r} knows no t for a sigma: give the times themselves.")

    def _alpha_sigma_at(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if self.variance_preserving:
            norm = torch.hypot(sigma, torch.ones_like(sigma))
            return 1 / norm, sigma / norm
        return torch.ones_like(sigma), sigma

    def check_t(self, t: Tensor) -> None:
        """Raise TypeError for a wrong dtype, ValueError for a NaN or a value out of range.

        Values are looked at on the CPU only: on an accelerator that would wait for the device. There a t out of range
        makes its row NaN (discrete) or is passed to the formula (continuous).
        """
        if not t.is_floating_point():
            raise TypeError(
                f"{self!r} is continuous: t must be floating point in {self._range()}; "
                f"got dtype {t.dtype}. Convert indices to times first, for example t = (index + 0.5) / steps."
            )
        if value_checks_are_free(t) and t.numel():
            low, high = (end.item() for end in t.aminmax())  # NaN if there is one
            # The ends as t's dtype has them: pi / 2 in float32 is the last time of TrigFlow, though larger in float64.
            first, last = torch.tensor([self.t_min, self.t_max], dtype=t.dtype, device="cpu").tolist()
            if not (low >= first and high <= last and high < math.inf):
                inside = (t >= first) & (t <= last) & t.isfinite()
                raise ValueError(f"t must lie in {self._range()} for {self!r}; got {_first(t[~inside])}.")

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    def _end(self, data_at: int) -> None:
        """Set ``data_at``. Raises ValueError for what is neither 0 nor 1."""
        if data_at not in (0, 1) or isinstance(data_at, bool):
            raise ValueError(f"data_at is the t of clean data, 0 or 1; got {data_at!r}.")
        if data_at:
            self.data_at = 1

    def _begin(self, t_min: float) -> None:
        """Set ``t_min``. Raises ValueError for one outside [0, t_max)."""
        check_numbers(t_min=t_min)
        if not 0 <= t_min < self.t_max:
            raise ValueError(f"t_min must lie in [0, {self.t_max:g}); got {t_min!r}.")
        if t_min:
            self.t_min = float(t_min)

    def _range(self) -> str:
        return f"[{self.t_min:g}, {self.t_max:g}" + ("]" if math.isfinite(self.t_max) else ")")

    def _arguments(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}


def check_process(process: Any) -> None:
    """Raise TypeError for what is no process, and say what to write in its place."""
    if isinstance(process, Process):
        return
    if isinstance(getattr(process, "process", None), Process):
        hint = "an Objective: write objective.process"
    elif isinstance(process, type) and issubclass(process, Process):
        hint = f"the class {process.__name__}: make one, {process.__name__}()"
    elif hasattr(process, "config") and type(process).__name__.endswith("Scheduler"):
        hint = f"a {type(process).__name__} of diffusers: write fastdiff.Objective.from_scheduler(scheduler)"
    elif isinstance(process, str) and plainly(process) in {*_SCHEDULES, *_SYNONYMS}:
        hint = f"the name of a beta schedule: write VariancePreserving({process!r})"
    else:
        hint = brief(process)
    raise TypeError(f"process must be a fastdiff process such as VariancePreserving(); got {hint}.")


class VariancePreserving(Process):
    """The discrete variance-preserving process of DDPM: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar).

    Args:
        betas: "linear" (Ho et al. 2020; 1e-4 to 0.02), "scaled_linear" (Rombach et al. 2022: linear in sqrt(beta);
            0.00085 to 0.012, Stable Diffusion's), "cosine" (Nichol and Dhariwal 2021, equation 17; diffusers'
            "squaredcos_cap_v2"), or the betas themselves: a 1-D tensor or sequence in (0, 1] (then ``steps`` is its
            length).
        steps: number of steps T. t is an integer in [0, T - 1]; t = 0 is the least noisy.
        beta_start, beta_end: for "linear" and "scaled_linear".
        zero_terminal_snr: rescale so that alpha_bar at T - 1 is exactly 0 (Lin et al. 2024, algorithm 1).

    Attributes: ``betas`` and ``alpha_bar``, float64 [T] on the CPU.

    Raises ValueError for an unknown schedule or betas out of range.
    """

    discrete = True
    variance_preserving = noisiest_last = True
    _ends: tuple[float | None, float | None] = (None, None)

    @answers_keywords(
        {
            "beta_schedule": "betas=",
            "schedule": "betas=",
            "trained_betas": "betas=",
            "num_train_timesteps": "steps=",
            "timesteps": "steps=",
            "rescale_betas_zero_snr": "zero_terminal_snr=",
        }
    )
    def __init__(
        self,
        betas: str | Tensor | list | tuple = "linear",
        steps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
        zero_terminal_snr: bool = False,
    ):
        if isinstance(betas, str):
            self.schedule = find("beta schedule", betas, _SCHEDULES, _SYNONYMS, "the betas")
            self._ends = beta_start, beta_end
            beta = _beta_schedule(self.schedule, steps, beta_start, beta_end)
        else:
            self.schedule = "given"
            if not hasattr(betas, "__len__"):
                raise TypeError(
                    f"betas must be a name, {', '.join(_SCHEDULES)}, or the betas themselves; got {brief(betas)}. "
                    f"How many there are is steps=."
                )
            beta = as_float64(betas).detach().to("cpu", torch.float64).clone()
            if beta_start is not None or beta_end is not None:
                raise ValueError(
                    f"beta_start and beta_end go with a named schedule, but the betas were given themselves; got "
                    f"{beta_start!r} and {beta_end!r}: leave them out."
                )
        if beta.ndim != 1 or len(beta) < 1:
            raise ValueError(f"betas must be a 1-D sequence of at least one value; got shape {tuple(beta.shape)}.")
        if not bool(((beta > 0) & (beta <= 1)).all()):
            raise ValueError(f"betas must lie in (0, 1]; got {_first(beta[~((beta > 0) & (beta <= 1))])}.")
        self.steps = len(beta)
        self.zero_terminal_snr = bool(zero_terminal_snr)

        # Sums of logarithms: 1 - alpha_bar keeps its digits at small t, where subtracting from 1 would lose them.
        log_alpha_bar = torch.log1p(-beta).cumsum(0)
        alpha, variance = (0.5 * log_alpha_bar).exp(), -torch.expm1(log_alpha_bar)
        if zero_terminal_snr:
            if self.steps < 2:
                raise ValueError(f"zero_terminal_snr needs at least 2 steps; got {self.steps}.")
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
            variance = torch.cat([variance[:1], ((1 - alpha) * (1 + alpha))[1:]])
            beta = torch.cat([beta[:1], 1 - (alpha[1:] / alpha[:-1]) ** 2])
        self._betas, self._alpha, self._sigma = beta, alpha, variance.sqrt()
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def betas(self) -> Tensor:
        return self._betas.clone()

    @property
    def alpha_bar(self) -> Tensor:
        return self._alpha**2

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float32 if t.device.type == "mps" else torch.float64
        table = cached(self._tables, t.device, lambda: torch.stack([self._alpha, self._sigma], -1).to(t.device, wide))
        return gather_rows(table, t).unbind(-1)

    def levels_between(self, t: Any) -> Levels:
        """The levels at times between the timesteps: sigma / alpha is interpolated linearly, as diffusers' Euler does.

        Raises ValueError for a t outside [0, steps - 1].
        """
        t = as_float64(t)
        inside = (t >= 0) & (t <= self.steps - 1)
        if not bool(inside.all()):
            raise ValueError(f"t must lie in [0, {self.steps - 1}] for {self!r}; got {_first(t[~inside])}.")
        low = t.floor().long()
        alpha, sigma = self.alpha_sigma(low)
        above = self.alpha_sigma((low + 1).clamp(max=self.steps - 1))
        part = t - low
        level = torch.lerp(sigma / alpha, above[1] / above[0], part)
        between_alpha, between_sigma = self._alpha_sigma_at(level)
        return Levels(t, torch.where(part > 0, between_alpha, alpha), torch.where(part > 0, between_sigma, sigma), self)

    def _time_at(self, sigma: Tensor) -> Tensor:
        # Linear in log sigma between the timesteps, and never beyond them: k-diffusion's convention and diffusers'.
        logs, log = (self._sigma / self._alpha).log(), sigma.log()
        if self.steps == 1:
            return torch.zeros_like(sigma)
        low = (torch.searchsorted(logs, log, right=True) - 1).clamp(0, self.steps - 2)
        part = ((log - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)
        return low + part

    def posterior(self, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x0) at integer ``t``: float64 (c_x0, c_xt, variance), mean = c_x0 x0 + c_xt x_t.

        At t = 0 the previous sample is x0 itself: (1, 0, 0). Ho et al. 2020, equations 6 and 7.
        """
        levels = self.levels(t)
        first = levels.t == 0
        alpha, sigma = self.alpha_sigma((levels.t - 1).clamp(min=0))
        alpha, sigma = torch.where(first, 1.0, alpha), torch.where(first, 0.0, sigma)
        return transition(levels.alpha, levels.sigma, alpha, sigma)[:3]

    def posterior_log_variance(self, t: Any, first: str = "clamp") -> Tensor:
        """log of the posterior variance, float64. At t = 0 that variance is 0, and there are two customs:
        ``first="clamp"`` takes log(1e-20) (diffusers), ``"reuse"`` the entry of t = 1 (guided-diffusion).
        """
        if first not in ("clamp", "reuse"):
            raise ValueError(f"first must be 'clamp' or 'reuse'; got {first!r}.")
        t = as_times(t)
        if first == "reuse":
            self.check_t(t)
            t = t.clamp(min=min(1, self.steps - 1))
        return self.posterior(t)[2].clamp(min=MIN_VARIANCE).log()

    def fraction(self, t: Tensor) -> Tensor:
        return as_float64(t) / self.steps

    def time_at(self, part: Tensor) -> Tensor:
        # The clamp: a density that returns exactly 1 (SD3's "mode" at u = 0) must not index past the end.
        return (part * self.steps).long().clamp(0, self.steps - 1)

    def check_t(self, t: Tensor) -> None:
        if t.dtype not in _INTEGERS:
            raise TypeError(
                f"{self!r} is discrete: t must be integer indices in [0, {self.steps - 1}]; got dtype {t.dtype}."
            )
        if value_checks_are_free(t) and t.numel():
            low, high = (end.item() for end in t.aminmax())
            if low < 0 or high >= self.steps:
                outside = t[(t < 0) | (t >= self.steps)]
                raise ValueError(f"t must lie in [0, {self.steps - 1}] for {self!r}; got {_first(outside)}.")

    def _arguments(self) -> dict[str, Any]:
        ends = {name: value for name, value in zip(("beta_start", "beta_end"), self._ends) if value is not None}
        shown = {"betas": self.schedule, "steps": self.steps} | ends
        return shown | {"zero_terminal_snr": True} if self.zero_terminal_snr else shown


class RectifiedFlow(Process):
    """Straight paths from data to noise: x_t = (1 - sigma) x0 + sigma n (Liu et al. 2022; Lipman et al. 2022).

    Args:
        shift: sigma = shift t / (1 + (shift - 1) t) for t in [0, 1] (Esser et al. 2024, equation 23). > 0.
        sigma_min: noise left on the data: the noise's factor is sigma + sigma_min (1 - sigma), in [0, 1).
        data_at: 1 for a t that runs from noise, 0, to data, 1 (Lipman et al. 2022; SiT): 1 - t takes the place of t.
            The velocity by that t is the prediction "reversed_flow". Densities of t are of that t too; the noise level
            sigma, the shift, and the fractions that weightings go by stay as they are.

    A network is told that sigma (without sigma_min), not t, as in the trainers of SD3 and Flux (they pass 1000 sigma);
    with ``data_at=1`` it is told 1 - sigma, which is t where there is no shift.
    """

    straight = True

    def __init__(self, shift: float = 1.0, sigma_min: float = 0.0, data_at: int = 0):
        check_numbers(shift=shift, sigma_min=sigma_min)
        if not shift > 0 or not math.isfinite(shift):
            raise ValueError(f"shift must be a positive number; got {shift!r}.")
        if not 0 <= sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1); got {sigma_min!r}.")
        self.shift, self.sigma_min = float(shift), float(sigma_min)
        self._end(data_at)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_float64(t)
        alpha, sigma = (t, 1 - t) if self.data_at else (1 - t, t)
        if self.shift != 1:
            below = 1 + (self.shift - 1) * sigma
            # alpha by its own formula: 1 - sigma would cancel near pure noise.
            alpha, sigma = alpha / below, self.shift * sigma / below
        return alpha, sigma + self.sigma_min * alpha if self.sigma_min else sigma

    def grid(self, steps: int) -> Tensor:
        return self._turned(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1])

    def model_time(self, levels: Levels) -> Tensor:
        return levels.alpha if self.data_at else 1 - levels.alpha

    def sigma_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio / (1 - self.sigma_min + ratio)

    def _alpha_sigma_at(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if bool((sigma > 1).any()):
            raise ValueError(f"sigma must lie in [0, 1] for {self!r}; got {_first(sigma[sigma > 1])}.")
        return (1 - sigma) / (1 - self.sigma_min), sigma

    def _time_at(self, sigma: Tensor) -> Tensor:
        level = (sigma - self.sigma_min) / (1 - self.sigma_min)
        return self._turned(level / (self.shift - (self.shift - 1) * level))


class EDM(Process):
    """Karras et al. 2022: x_t = x0 + sigma n, and t is sigma itself, in [0, infinity).

    ``sigma_data`` is the standard deviation of the data, for the preconditioned prediction "edm" and its weighting.
    """

    t_max = math.inf
    t_is_sigma = True

    def __init__(self, sigma_data: float = 0.5):
        check_numbers(sigma_data=sigma_data)
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive; got {sigma_data!r}.")
        self.sigma_data = float(sigma_data)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_float64(t)
        return torch.ones_like(t), t

    def fraction(self, t: Tensor) -> Tensor:
        raise ValueError("EDM's t is sigma, which has no fraction; use a weighting, loss or timesteps made for sigma.")

    def grid(self, steps: int) -> Tensor:
        return karras(steps)

    def time_at(self, part: Tensor) -> Tensor:
        raise ValueError("EDM's t is sigma: draw it with timesteps=fastdiff.timesteps.LogNormal(), or pass t.")

    def _time_at(self, sigma: Tensor) -> Tensor:
        return sigma


_SCHEDULES = {name: name for name in ("linear", "scaled_linear", "cosine")}
_SYNONYMS = {"squaredcos_cap_v2": "cosine"}


def _beta_schedule(name: str, steps: int, start: float | None, end: float | None) -> Tensor:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer; got {steps!r}.")
    if name == "cosine":
        if start is not None or end is not None:
            raise ValueError(
                f"the cosine schedule takes no beta_start or beta_end; got {start!r} and {end!r}: leave them out."
            )
        i = torch.arange(steps + 1, dtype=torch.float64, device="cpu")
        alpha_bar = torch.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    defaults = (1e-4, 0.02) if name == "linear" else (0.00085, 0.012)
    start = defaults[0] if start is None else start
    end = defaults[1] if end is None else end
    check_numbers(beta_start=start, beta_end=end)
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64, device="cpu") ** 2


def _first(values: Tensor) -> str:
    """The first few offending values, for an error message."""
    shown = ", ".join(f"{value:g}" for value in values.flatten()[:3].tolist())
    return shown + (f" and {values.numel() - 3} more" if values.numel() > 3 else "")
