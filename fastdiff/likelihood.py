"""The likelihood of data under a trained network, by the probability-flow ODE (Song et al. 2021, section 4.3 and D.2).

With the angle phi whose tangent is sigma / alpha, and y = x_t / norm, norm = sqrt(alpha^2 + sigma^2), the ODE of every
process is dy / dphi = v, the network's v-prediction: cos(phi) n - sin(phi) x0. Nothing in it is infinite at either end,
and alpha and sigma need no derivatives. The logarithm of the density of y falls along it by the divergence of v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import modes, ops
from . import prediction as kinds
from .ops.checks import check_floating, check_tensor
from .philox import Philox, Stream, seeded, whole
from .prediction import Prediction
from .process import Levels, Process, as_float64
from .samplers.base import initial_std
from .samplers.spacing import times as spaced
from .sampling import TrainedOn
from .sampling.checking import explain_call, trained_on
from .sampling.conditions import conditions

TRACES = ("exact", "rademacher", "gaussian")
FIXED, ADAPTIVE = ("rk4", "heun"), ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
_VELOCITY = Prediction("velocity by the angle", kinds.velocity)


@torch.no_grad()
def log_likelihood(
    model: Callable[..., Tensor],
    x0: Tensor,
    process: Process | TrainedOn,
    prediction: str | Prediction | None = None,
    *,
    steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    solver: str = "rk4",
    trace: str = "rademacher",
    probes: int = 1,
    cond: Any = None,
    seed: int | Tensor | None = None,
    sample_offset: int | None = None,
    ids: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """log p(x0) of each sample, in nats: of the distribution that deterministic sampling (DDIM) draws from.

    Args:
        model: called as ``model(x, t)``, or ``model(x, t, cond)``, as in ``fastdiff.sample``. It is differentiated by
            x, and must treat each sample by itself.
        x0: the data, [batch, ...], floating point. The network is given this dtype; all else is float64.
        process, prediction: those of training, or the ``Objective`` in place of the process.
        steps, timesteps: where a solver of fixed steps goes, as for samplers: the process's grid of so many times, or
            the times themselves, the noisiest first. The process's first time comes below them, unless the
            network's output does not determine the velocity there (``VPSDE`` and "score" at t = 0: give it a
            ``t_min``). x0 is taken for x_t at the lowest time, and x_t at the highest for the noise that sampling
            starts from.
        solver: "rk4" (four calls of the network a step; half of them between the times, for a discrete process at
            fractional timesteps) or "heun" (two calls, at the times); or an adaptive one of torchdiffeq, "dopri5",
            "dopri8", "bosh3", "fehlberg2" or "adaptive_heun", with the tolerances ``rtol`` and ``atol``, which it
            judges over the whole batch.
        trace: of the network's Jacobian: "exact" (a backward pass for each number of a sample); or Hutchinson's
            estimate with "rademacher" or "gaussian" probes, whose log-likelihood is unbiased.
        probes: how many of these; a backward pass each.
        cond: as in ``fastdiff.sample``. A run under ``torch.inference_mode`` needs one that was made outside of it.
        seed: of the probes; None: PyTorch's default generator. The probes of a sample depend on its index.
        sample_offset: the index of the first sample.
        ids: in its place a number for each sample, integers [batch].

    Returns float64 [batch], without gradients. Raises TypeError or ValueError for unfit inputs, ImportError for an
    adaptive solver without torchdiffeq.
    """
    check_floating(x0=x0)
    process, prediction = trained_on(process, prediction)
    for name, value, accepted in (("trace", trace, TRACES), ("solver", solver, FIXED + ADAPTIVE)):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}.")
    probes = whole("probes", probes)
    if probes < 1:
        raise ValueError(f"probes must be at least 1; got {probes}.")
    nodes = _nodes(process, prediction, None if steps is None else whole("steps", steps), timesteps)
    vectors = None
    if trace != "exact":
        seed, samples = seeded(seed, None, ids, sample_offset, len(x0), x0.device)
        noise = Philox(seed, samples, Stream.PROBE)
        vectors = ops.materialize(noise, (len(x0), probes, *x0.shape[1:]), x0.device).to(x0.dtype)
        if trace == "rademacher":
            vectors = torch.where(vectors < 0, -1.0, 1.0).to(x0.dtype)
    cond = None if cond is None else conditions(cond, None, len(x0))[0]
    field = _Field(model, process, prediction, cond, x0.dtype, vectors)
    first, last = nodes[0], nodes[-1]
    state = _State(as_float64(x0) / _norm(first), torch.zeros(len(x0), dtype=torch.float64, device=x0.device))
    if solver in FIXED:
        for a, b in zip(nodes, nodes[1:]):
            state = _STEPS[solver](field, a, b, state)
    else:
        state = _adaptive(field, solver, first, last, state, rtol, atol)
    size = math.prod(x0.shape[1:])
    norm, std = _norm(last), initial_std(last)
    x = (norm * state.y).flatten(1) if size else state.y.new_zeros(len(x0), 0)
    prior = -0.5 * (x / std).square().sum(1) - size * math.log(std * math.sqrt(2 * math.pi))
    # The densities of x at both ends from those of y: norm is the factor between them.
    return prior + state.divergence + size * math.log(norm / _norm(first))


def to_bits_per_dim(log_likelihood: Tensor, dimensions: int, bin_width: float = 1.0) -> Tensor:
    """Log-likelihoods in nats as bits per dimension, the smaller the better: of the shape of ``log_likelihood``.

    Args:
        log_likelihood: of whole samples, such as [batch].
        dimensions: how many numbers a sample has.
        bin_width: for discrete data to which uniform noise of this width was added (uniform dequantization), the
            width: 2 / 256 for 256 levels over [-1, 1].

    Raises ValueError for dimensions or a width that are not positive.
    """
    for name, value in (("dimensions", dimensions), ("bin_width", bin_width)):
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value!r}.")
    return -(log_likelihood / dimensions + math.log(bin_width)) / math.log(2)


class _State(NamedTuple):
    """y, [batch, ...], and the integral of the divergence of v up to here, [batch]. Also the derivatives of the two."""

    y: Tensor
    divergence: Tensor

    def plus(self, width: float, *slopes: _State) -> _State:
        """This state after ``width`` of the angle along the mean of ``slopes``."""
        y, divergence = (sum(parts) * (width / len(slopes)) for parts in zip(*slopes))
        return _State(self.y + y, self.divergence + divergence)


class _Field:
    """The derivatives of the state by the angle, at a level."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        process: Process,
        prediction: Prediction,
        cond: Any,
        dtype: torch.dtype,
        probes: Tensor | None,
    ):
        self._model, self.process, self._prediction, self._cond = model, process, prediction, cond
        self._dtype, self._probes = dtype, probes

    def __call__(self, levels: Levels, y: Tensor) -> _State:
        norm = _norm(levels)
        k_x, k_m = (float(k) for k in kinds.conversion(self._prediction, _VELOCITY, levels))
        scale, time = kinds.model_input(self._prediction, levels)
        scale = 1.0 if scale is None else float(scale)
        x = norm * y
        if time.is_floating_point():
            time = time.to(torch.float64 if self._dtype == torch.float64 else torch.float32)
        m, trace = self._jacobian((scale * x).to(self._dtype), time.to(y.device).expand(len(y)))
        size = math.prod(y.shape[1:])
        return _State(k_x * x + k_m * m, norm * (k_x * size + k_m * scale * trace))

    def _jacobian(self, seen: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output, and the trace of its Jacobian, float64 [batch]."""
        with modes.gradients():
            seen, time = modes.plain(seen.detach()).requires_grad_(), modes.plain(time)
            try:
                m = self._model(seen, time) if self._cond is None else self._model(seen, time, self._cond)
            except TypeError as error:
                explain_call(error, self._model, self._cond)
                raise
            check_tensor("the model's output", m, "output")
            if m.shape != seen.shape:
                raise ValueError(f"the model returned shape {tuple(m.shape)} for an input of {tuple(seen.shape)}.")
            trace = torch.zeros(len(seen), dtype=torch.float64, device=seen.device)
            if m.requires_grad and m.numel():
                if self._probes is None:
                    # All samples at once: a sample's output depends on its own input alone.
                    flat = m.flatten(1)
                    for i in range(flat.shape[1]):
                        trace += self._gradient(flat[:, i].sum(), seen, i + 1 < flat.shape[1]).flatten(1)[:, i]
                else:
                    count = self._probes.shape[1]
                    for j in range(count):
                        e = modes.plain(self._probes[:, j])
                        gradient = self._gradient((m * e).sum(), seen, j + 1 < count)
                        trace += (gradient * e.double()).flatten(1).sum(1) / count
        return m.detach().double(), trace

    @staticmethod
    def _gradient(value: Tensor, seen: Tensor, again: bool) -> Tensor:
        (found,) = torch.autograd.grad(value, seen, retain_graph=again, allow_unused=True)
        return torch.zeros_like(seen, dtype=torch.float64) if found is None else found.double()


def _norm(levels: Levels) -> float:
    return math.hypot(float(levels.alpha), float(levels.sigma))


def _angle(levels: Levels) -> float:
    return math.atan2(float(levels.sigma), float(levels.alpha))


def _at(process: Process, angle: float) -> Levels:
    """The level at an angle between those of the process."""
    ratio = torch.tensor([math.tan(angle)], dtype=torch.float64, device="cpu")
    return process.levels_at(process.sigma_of_ratio(ratio))


def _heun(field: _Field, a: Levels, b: Levels, state: _State) -> _State:
    width = _angle(b) - _angle(a)
    k1 = field(a, state.y)
    k2 = field(b, state.plus(width, k1).y)
    return state.plus(width, k1, k2)


def _rk4(field: _Field, a: Levels, b: Levels, state: _State) -> _State:
    width = _angle(b) - _angle(a)
    middle = _at(field.process, _angle(a) + width / 2)
    k1 = field(a, state.y)
    k2 = field(middle, state.plus(width / 2, k1).y)
    k3 = field(middle, state.plus(width / 2, k2).y)
    k4 = field(b, state.plus(width, k3).y)
    return state.plus(width, k1, k2, k2, k3, k3, k4)


_STEPS = {"rk4": _rk4, "heun": _heun}


def _adaptive(
    field: _Field, solver: str, first: Levels, last: Levels, state: _State, rtol: float, atol: float
) -> _State:
    """The state at the last level, by torchdiffeq."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            f"solver={solver!r} needs torchdiffeq: install fastdiff[ode], or use solver='rk4' or 'heun'."
        ) from error
    low, high = _angle(first), _angle(last)

    def slope(angle: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return field(_at(field.process, min(max(float(angle), low), high)), state[0])

    angles = torch.tensor([low, high], dtype=torch.float64, device=state.y.device)
    # A step must end at the last angle: by itself the solver goes beyond, where there are no levels, and interpolates.
    path = odeint(slope, tuple(state), angles, rtol=rtol, atol=atol, method=solver, options={"step_t": angles[1:]})
    return _State(*(part[-1] for part in path))


def _nodes(
    process: Process, prediction: Prediction, steps: int | None, timesteps: Sequence[float] | None
) -> list[Levels]:
    """The levels, each of shape [1], that the solver goes through, the cleanest first."""
    times = spaced(process, steps, timesteps=timesteps).flip(0)
    cleanest = process.t_max if process.data_at else process.t_min
    first = torch.zeros_like(times[:1]) if process.discrete else torch.full_like(times[:1], cleanest)
    if times[0] != first and bool(_is_determined(process, prediction, first)):
        times = torch.cat([first, times])
    determined = _is_determined(process, prediction, times)
    if not bool(determined.all()):
        t = times[~determined][0].item()
        raise ValueError(
            f"{prediction.name!r} does not determine the velocity at t = {t} of {process!r}: use a network with "
            f"prediction 'v_prediction', or give timesteps without this one."
        )
    return [process.levels(t) for t in times.split(1)]


def _is_determined(process: Process, prediction: Prediction, times: Tensor) -> Tensor:
    k_x, k_m = kinds.conversion(prediction, _VELOCITY, process.levels(times))
    return k_x.isfinite() & k_m.isfinite()
