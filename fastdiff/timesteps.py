"""Timestep samplers: pure functions from uniforms in (0, 1) to the times of a process (inverse distribution functions).

The uniforms come from the same counter-based generator as the noise, so t too depends on (seed, sample index) alone.
A sampler makes fractions of the process, which the process turns into its own t: 0 is clean and 1 noise, and the other
way about for a process whose t runs from noise to data (``data_at=1``), since a density is one of t. Only LogNormal
makes sigmas, for EDM, and UniformLogSNR signal-to-noise ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .names import find
from .numeric import check_fields, check_numbers
from .process import Process, as_float64, check_by
from .quantiles import beta_quantiles, interpolate, steps_of, stepwise
from .showing import brief, brief_fields
from .tensors import cached, value_checks_are_free


class Timesteps:
    """Base: ``fraction(u)`` maps float64 uniforms, [B] or [B, F], to fractions in [0, 1]."""

    of_whole_batch = False  # whether a time depends on the uniforms of the other samples

    def __post_init__(self):
        check_fields(self)

    def fraction(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """Times of ``process`` for uniforms ``u`` in (0, 1): int64 for discrete processes, else float64."""
        return process.time_at(self.fraction(as_float64(u)))


@dataclass(frozen=True)
class Uniform(Timesteps):
    """Uniform over the fractions [low, high) of the process: all of it by default.

    ``by="sigma"``, for RectifiedFlow: it is the sigma, after the shift, that is uniform over [low, high).
    """

    low: float = 0.0
    high: float = 1.0
    by: str = "fraction"

    def __post_init__(self):
        super().__post_init__()
        _part_of_the_process(self.low, self.high)
        check_by(self.by)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        if self.by == "fraction":
            return super().__call__(u, process)
        if not process.straight or process.discrete:
            raise ValueError(f"Uniform(by='sigma') draws the sigma of a RectifiedFlow; got {process!r}.")
        return process.time_of((self.low + (self.high - self.low) * as_float64(u)).clamp(min=process.sigma_min))

    def fraction(self, u: Tensor) -> Tensor:
        if (self.low, self.high) == (0.0, 1.0):
            return u
        return self.low + (self.high - self.low) * u


@dataclass(frozen=True)
class Spread(Timesteps):
    """Base: (u_0 + points) mod 1 in place of u. Each t alone is distributed as by ``inner``; the t of a batch cover its
    distribution evenly, so they depend on the batch as a whole. Of several times a sample, [B, F], the t of each frame
    cover it by themselves: those of a sample stay independent."""

    inner: Timesteps = field(default_factory=Uniform)

    of_whole_batch = True

    def __post_init__(self):
        object.__setattr__(self, "inner", _named(self.inner))

    def points(self, count: int, device: torch.device) -> Tensor:
        """``count`` points in [0, 1): float64 on ``device``."""
        raise NotImplementedError

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        if not u.numel():
            return self.inner(u, process)
        u = as_float64(u)
        points = self.points(len(u), u.device).view(-1, *(1,) * (u.ndim - 1))
        # Open interval: an inner quantile function may be infinite at 0.
        return self.inner(((u[:1] + points) % 1).clamp(2.0**-53, 1 - 2.0**-53), process)


@dataclass(frozen=True)
class Stratified(Spread):
    """Low-discrepancy over the batch: (u_0 + i / B) mod 1 in place of u_i (Kingma et al. 2021, appendix I.1)."""

    def points(self, count: int, device: torch.device) -> Tensor:
        return torch.arange(count, dtype=torch.float64, device=device) / count


@dataclass(frozen=True)
class Sobol(Spread):
    """(u_0 + v_i) mod 1 in place of u_i, v_i being 0, 1/2, 1/4, 3/4, 1/8, ...: the Sobol sequence of one dimension
    (Sobol 1967), rotated at random.

    The first half of a batch covers the distribution evenly too, its first quarter, and so on, which those of
    ``Stratified`` do not. A batch of a power of two has the points of ``Stratified``, in another order.
    """

    def points(self, count: int, device: torch.device) -> Tensor:
        i = torch.arange(count, dtype=torch.int64, device=device)
        reversed_bits = sum((i >> k & 1) << (31 - k) for k in range(max(1, (count - 1).bit_length())))
        return reversed_bits.double() * 2.0**-32


@dataclass(frozen=True)
class LogitNormal(Timesteps):
    """sigmoid of a normal (Esser et al. 2024, equation 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _positive("std", self.std)

    def fraction(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Mode(Timesteps):
    """1 - u - scale (cos^2(pi u / 2) - 1 + u): mass towards the middle (Esser et al. 2024, equation 20)."""

    scale: float = 1.29

    def __post_init__(self):
        super().__post_init__()
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must lie in [-1, {2 / (math.pi - 2):.4f}] (monotone there); got {self.scale!r}.")

    def fraction(self, u: Tensor) -> Tensor:
        return (1 - u - self.scale * (torch.cos(u * (math.pi / 2)) ** 2 - 1 + u)).clamp(0, 1)


@dataclass(frozen=True)
class CosMap(Timesteps):
    """1 - 1 / (tan(pi u / 2) + 1): uniform for the cosine schedule (Esser et al. 2024, equation 21)."""

    def fraction(self, u: Tensor) -> Tensor:
        return 1 - 1 / (torch.tan(u * (math.pi / 2)) + 1)


@dataclass(frozen=True)
class Cubic(Timesteps):
    """1 - u^3: mass towards the noise (Mou et al. 2023, T2I-Adapter, section 3.3)."""

    def fraction(self, u: Tensor) -> Tensor:
        return 1 - u * u * u


@dataclass(frozen=True)
class Beta(Timesteps):
    """The beta distribution, whose density is proportional to t^(a - 1) (1 - t)^(b - 1).

    With a = 1 or b = 1 its quantiles are powers; otherwise they are interpolated, by PyTorch for each batch, with
    probabilities within 1e-9. The trainers of pi0 (Black et al. 2024) draw ``Within(Beta(1.5, 1.0), 0.001, 1.0)``.
    a and b lie in [0.05, 1000].
    """

    a: float
    b: float

    def __post_init__(self):
        super().__post_init__()
        for name in ("a", "b"):
            _positive(name, getattr(self, name))
            if not 0.05 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} must lie in [0.05, 1000]; got {getattr(self, name)!r}.")
        object.__setattr__(self, "_tables", {})

    def fraction(self, u: Tensor) -> Tensor:
        if self.b == 1:
            return u ** (1 / self.a)
        if self.a == 1:
            return -torch.expm1(torch.log1p(-u) / self.b)
        return interpolate(cached(self._tables, u.device, lambda: beta_quantiles(self.a, self.b).to(u.device)), u)


@dataclass(frozen=True)
class Table(Timesteps):
    """The density is proportional to ``weights``, one for each of as many equal parts of the process, and even within a
    part: for a process of as many steps, the weights of its steps.

    Trainers that favour a part of the steps ("timestep bias") multiply the weights of that part:
    ``Table([1.0] * 750 + [3.0] * 250)`` draws each of the last 250 steps three times as often.

    Args:
        weights: numbers of at least 0, some above 0: a sequence, or a tensor [parts].
    """

    weights: Sequence[float]

    def __post_init__(self):
        weights = self.weights.tolist() if isinstance(self.weights, Tensor) else self.weights
        if isinstance(weights, (str, bytes)) or not isinstance(weights, Sequence) or not len(weights):
            raise TypeError(f"weights must be a sequence of numbers, or a tensor of one dimension; got {weights!r}.")
        for k, weight in enumerate(weights):
            check_numbers(**{f"weights[{k}]": weight})
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights must be finite numbers of at least 0; weights[{k}] is {weight!r}.")
        if not any(weights):
            raise ValueError(f"all {len(weights)} weights are 0: nothing could be drawn.")
        object.__setattr__(self, "weights", tuple(map(float, weights)))
        object.__setattr__(self, "_tables", {})

    __repr__ = brief_fields

    def fraction(self, u: Tensor) -> Tensor:
        return stepwise(cached(self._tables, u.device, lambda: steps_of(self.weights).to(u.device)), u)


@dataclass(frozen=True)
class Within(Timesteps):
    """``inner``, scaled to the part [low, high) of the process: low + (high - low) of its fraction, as trainers have it
    that draw between a least and a most timestep."""

    inner: Timesteps
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "inner", _of_fractions("Within", self.inner))
        _part_of_the_process(self.low, self.high)

    def fraction(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.inner.fraction(u)


@dataclass(frozen=True)
class Mixture(Timesteps):
    """One of several, each with its probability: ``Mixture([(0.9, LogitNormal()), (0.1, Uniform())])``.

    Args:
        parts: pairs of a positive number and a sampler of fractions (an object, its name or a function); the numbers
            are divided by their sum.
    """

    parts: Sequence[tuple[float, Timesteps]]

    def __post_init__(self):
        try:
            pairs = [(weight, part) for weight, part in self.parts]
        except (TypeError, ValueError):
            raise TypeError(f"parts must be pairs of a number and a timestep sampler; got {self.parts!r}.") from None
        if not pairs:
            raise ValueError("a mixture needs a part at the least; got none.")
        for weight, _ in pairs:
            check_numbers(probability=weight)
            _positive("the probability of a part", weight)
        whole = math.fsum(weight for weight, _ in pairs)
        parts = tuple((weight / whole, _of_fractions("Mixture", part)) for weight, part in pairs)
        object.__setattr__(self, "parts", parts)

    def fraction(self, u: Tensor) -> Tensor:
        """The part is chosen by where u falls, and is given where in its share it falls."""
        begin, chosen = 0.0, None
        for weight, part in self.parts:
            within = ((u - begin) / weight).clamp(2.0**-53, 1 - 2.0**-53)
            drawn = part.fraction(within)
            chosen = drawn if chosen is None else torch.where(u < begin, chosen, drawn)
            begin += weight
        return chosen


@dataclass(frozen=True)
class Function(Timesteps):
    """A function of one's own: ``function(u)`` gives the fractions for float64 uniforms [B]. A plain function given as
    ``timesteps`` becomes one."""

    function: Callable[[Tensor], Tensor]

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(f"function must be callable; got {brief(self.function)}.")

    def fraction(self, u: Tensor) -> Tensor:
        found = self.function(u)
        if not isinstance(found, Tensor) or found.shape != u.shape or not found.is_floating_point():
            raise ValueError(
                f"timesteps={brief(self.function)} must give fractions in [0, 1], a floating-point tensor "
                f"{tuple(u.shape)} like the uniforms that it is given; got {brief(found)}."
            )
        found = as_float64(found)
        if value_checks_are_free(found) and not bool(((found >= 0) & (found <= 1)).all()):
            raise ValueError(f"timesteps={brief(self.function)} must give fractions in [0, 1]; it gave {brief(found)}.")
        return found


@dataclass(frozen=True)
class LogNormal(Timesteps):
    """ln(sigma / alpha) ~ N(mean, std^2).

    For EDM, whose t is that sigma (Karras et al. 2022, table 1), and for TrigFlow and Cosine (Lu and Song 2024: t =
    arctan(exp(tau) / sigma_data), tau ~ N(-1, 1.4^2)).

    Args:
        std_above: of the half above the mean, which then is the mode, and ``std`` of the half below it ("split
            lognormal"); None: as ``std``. The density has no jump.
    """

    mean: float = -1.2
    std: float = 1.2
    std_above: float | None = None

    def __post_init__(self):
        super().__post_init__()
        _positive("std", self.std)
        if self.std_above is not None:
            _positive("std_above", self.std_above)

    def _normal(self, u: Tensor) -> Tensor:
        """The quantiles of std times a normal, or of two halves that meet where the density is highest."""
        if self.std_above is None:
            return self.std * torch.special.ndtri(u)
        below = self.std / (self.std + self.std_above)  # the probability of the half below
        left = self.std * torch.special.ndtri(torch.clamp(u / (2 * below), max=0.5))
        right = self.std_above * torch.special.ndtri(torch.clamp((1 - u) / (2 * (1 - below)), max=0.5))
        return left - right

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        sigma = torch.exp(self.mean + self._normal(as_float64(u)))
        if process.t_is_sigma:
            return sigma
        if process.discrete or process.straight or not _has_every_ratio(process):
            raise ValueError(
                f"LogNormal draws any sigma / alpha from 0 to infinity, so it goes with fastdiff.EDM, TrigFlow and "
                f"Cosine; got {process!r}."
            )
        return process.time_of(sigma)


@dataclass(frozen=True)
class UniformLogSNR(Timesteps):
    """The logarithm of the SNR is uniform between those of two fractions of a continuous process.

    It is the importance sampling of Song et al. 2021 (Maximum Likelihood Training of Score-Based Diffusion Models,
    arXiv 2101.09258): since d log SNR / dt = -g(t)^2 / sigma(t)^2, t has the density g^2 / (sigma^2 Z). So the
    likelihood weighting is the constant Z, ``normalizer``, on the error of the noise: ``error_space="epsilon"``.

    The SNR must be finite and positive at both ends: give a process that begins at t = 0 a ``t_min`` (VPSDE, SubVPSDE),
    or take other fractions.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _part_of_the_process(self.low, self.high)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        most, least = self._ends(process)
        return process.time_of(process.sigma_of_ratio(torch.exp(((most - least) * as_float64(u) - most) / 2)))

    def normalizer(self, process: Process) -> float:
        """Z, the integral of g(t)^2 / sigma(t)^2 over the times that are drawn: the difference of the ends' log SNR."""
        most, least = self._ends(process)
        return abs(most - least)

    def density(self, t: Tensor, process: Process) -> Tensor:
        """The density of the times that are drawn, at times between the ends, for a process that has
        ``diffusion_squared``: float64, of t's shape."""
        return process.diffusion_squared(t) / process.alpha_sigma(t)[1] ** 2 / self.normalizer(process)

    def _ends(self, process: Process) -> tuple[float, float]:
        """The log SNR at the fractions ``low`` and ``high``."""
        if process.discrete:
            raise ValueError(f"UniformLogSNR needs a continuous process; got {process!r}.")
        ends = torch.tensor([self.low, self.high], dtype=torch.float64, device="cpu")
        alpha, sigma = process.alpha_sigma(process.time_at(ends))
        most, least = (2 * (alpha.log() - sigma.log())).tolist()
        if math.isinf(most) or math.isinf(least):
            where = self.low if math.isinf(most) else self.high
            raise ValueError(
                f"the log SNR of {process!r} is infinite at the fraction {where}: use a process with a t_min, such as "
                f"VPSDE(t_min=1e-5), or UniformLogSNR(low, high) within (0, 1)."
            )
        return most, least


@dataclass(frozen=True)
class Shifted(Timesteps):
    """shift t / (1 + (shift - 1) t) of ``inner``'s fractions. For RectifiedFlow prefer its own ``shift``."""

    inner: Timesteps
    shift: float

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "inner", _named(self.inner))
        _positive("shift", self.shift)

    def fraction(self, u: Tensor) -> Tensor:
        t = self.inner.fraction(u)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        if getattr(process, "shift", 1.0) != 1.0:
            raise ValueError(f"the shift would be applied twice: {process!r} has one of its own. Use one of the two.")
        if self.inner.of_whole_batch:
            name = type(self.inner).__name__
            raise ValueError(f"put {name} outside: {name}(Shifted(inner, shift)).")
        return super().__call__(u, process)


_NAMES = {
    "uniform": Uniform,
    "stratified": Stratified,
    "logit_normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "cubic": Cubic,
    "sobol": Sobol,
    "lognormal": LogNormal,
    "uniform_log_snr": UniformLogSNR,
}


def get(timesteps: Timesteps | str | None, process: Process) -> Timesteps:
    """A sampler from its name or itself; None: LogNormal for EDM's sigmas, uniform for every other process."""
    if timesteps is None:
        return LogNormal() if process.t_is_sigma else Uniform()
    return _named(timesteps)


def _named(timesteps: Timesteps | str) -> Timesteps:
    if isinstance(timesteps, str):
        return find("timestep sampler", timesteps, _NAMES, {}, "an object")()
    if isinstance(timesteps, Timesteps):
        return timesteps
    if callable(timesteps) and not isinstance(timesteps, type):
        return Function(timesteps)
    raise TypeError(
        "timesteps must be None, a name, a fastdiff.timesteps object or a function from uniforms to fractions; got "
        f"{brief(timesteps)}."
    )


def _of_fractions(outer: str, timesteps: Timesteps | str) -> Timesteps:
    """A sampler from its name or itself, which must be one of fractions, each by itself."""
    found = _named(timesteps)
    if type(found).fraction is Timesteps.fraction or (isinstance(found, Uniform) and found.by != "fraction"):
        raise ValueError(
            f"{outer} is of samplers of fractions; got {found!r}, which "
            + ("is of a whole batch: put it outside." if found.of_whole_batch else "makes noise levels.")
        )
    return found


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number; got {value!r}.")


def _has_every_ratio(process: Process) -> bool:
    """Whether sigma / alpha of a continuous process reaches from 0 to infinity."""
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device="cpu")
    alpha, sigma = process.alpha_sigma(ends)
    return sigma.min().item() == 0 and alpha.min().item() == 0


def _part_of_the_process(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"0 <= low < high <= 1 is needed; got low={low!r}, high={high!r}.")
