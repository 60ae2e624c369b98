"""``add_noise``, ``scale_noise``, ``get_velocity`` and ``scale_model_input`` of diffusers' schedulers, fused, and their
coefficients.

As ``step.fused_step``, each function of a method takes (the method that it stands for, the name under which its calls
are counted, a ``Cache``) and gives the fused one. x, n and timesteps are checked, and what does not fit is left to the
method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...tensors import cached
from ...torch_access import number
from . import rows
from .call_counts import count, fused, left
from .coefficient_cache import INPUT, NOISE, Cache, Coefficients, exact, host, untraced
from .source_digests import Method
from .step import unfit

_is_compiling = torch.compiler.is_compiling

# -------------------------------------------------------------------------------------------------- coefficients


class NoiseByTimestep(Coefficients):
    """Levels (alpha, sigma) by the timestep.

    Attributes:
        noise: ``ops.PreparedNoise`` of x_t; ``velocity``: the same of velocities.
    """

    kept_as = NOISE
    tensor_names = ("alphas_cumprod",)
    fast = True

    def make(self, scheduler: Any, config: Any) -> None:
        bars = exact(scheduler.alphas_cumprod)
        alpha, sigma = bars.sqrt(), (1 - bars).sqrt()
        self.noise = ops.PreparedNoise(torch.stack([alpha, sigma], -1))
        self.velocity = ops.PreparedNoise(torch.stack([-sigma, alpha], -1))


class NoiseBySigma(Coefficients):
    """Levels by the index of a step.

    Attributes:
        noise: ``ops.PreparedNoise`` of x_t. The row behind the last is NaN.
        at: {timestep: index of its step}.
        default: the index of a timestep that is none of the scheduler's; None: there is none.
    """

    kept_as = NOISE
    tensor_names = ("sigmas", "timesteps", "alphas_cumprod")
    fast = True
    missing: int | None = None  # ``default``, counted from the end of the timesteps

    def make(self, scheduler: Any, config: Any) -> None:
        sigmas = exact(scheduler.sigmas)
        nowhere = torch.full((1, 2), torch.nan, dtype=torch.float64)
        self.noise = ops.PreparedNoise(torch.cat([torch.stack(self.levels(sigmas), -1), nowhere]))
        self.count = len(sigmas)
        self.times = host(scheduler.timesteps)
        times = self.times.tolist()
        self.default = None if self.missing is None else len(times) + self.missing
        self.at: dict[float, int] = {}
        second: set[float] = set()
        for k, t in enumerate(times):
            # Of several equal timesteps it is the second that counts.
            if t not in self.at:
                self.at[t] = k
            elif t not in second:
                self.at[t] = k
                second.add(t)
        self.sorted: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def levels(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), [steps + 1] each, of the scheduler's ``sigmas`` [steps + 1]."""
        return torch.ones_like(sigmas), sigmas

    def fast_index(self, scheduler: Any, timesteps: Any, velocity: bool) -> int | None:
        """The row of a single timestep; None if it takes more to find one."""
        t = number(timesteps, 1)
        if type(t) is not float and (velocity or t is None):
            return None
        index = scheduler._begin_index
        if velocity or index is None:
            index = self.at.get(t, self.default)
        elif scheduler._step_index is not None:
            index = scheduler._step_index
        return index if index is not None and 0 <= index < self.count else None

    @untraced
    def find(self, timesteps: Tensor) -> int | Tensor | None:
        """The rows of ``timesteps`` [batch], int64 [batch], or one row for all; None if one of them is none of the
        scheduler's and there is no default."""
        if timesteps.is_cpu:
            at, default = self.at, self.default
            found = [at.get(t, default) for t in timesteps.tolist()]
            if None in found or not found:
                return None
            return found[0] if found.count(found[0]) == len(found) else torch.tensor(found)
        values, index = self._sorted(timesteps.device)
        if timesteps.dtype != values.dtype:
            timesteps = timesteps.to(values.dtype)
        place = torch.searchsorted(values, timesteps.contiguous()).clamp(max=len(values) - 1)
        default = self.count if self.default is None else self.default  # the row of NaN: nothing can be raised here
        return torch.where(values[place] == timesteps, index[place], default)

    def _sorted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        found = self.sorted.get(device)
        if found is None:
            values, order = torch.tensor(list(self.at), dtype=self.times.dtype).sort()
            index = torch.tensor(list(self.at.values()))[order]
            found = self.sorted[device] = values.to(device), index.to(device)
        return found


class EulerNoise(NoiseBySigma):
    """Also of ``get_velocity``, which looks alphas_cumprod up by the index of the step."""

    def make(self, scheduler: Any, config: Any) -> None:
        super().make(scheduler, config)
        bars = exact(scheduler.alphas_cumprod)[: self.count]
        table = torch.full((self.count + 1, 2), torch.nan, dtype=torch.float64)
        table[: len(bars)] = torch.stack([-(1 - bars).sqrt(), bars.sqrt()], -1)
        self.velocity = ops.PreparedNoise(table)


class FlowNoise(NoiseBySigma):
    def levels(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - sigmas, sigmas


class MultistepNoise(NoiseBySigma):
    missing = -1

    def levels(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return rows.levels_of(sigmas, bool(self.config.use_flow_sigmas))


class InputScales(Coefficients):
    """The numbers that ``scale_model_input`` divides by. They are computed once for each step, in the scheduler's
    own way."""

    kept_as = INPUT
    tensor_names = ("sigmas",)
    divides, marks = True, True  # x / scale, not x * scale; is_scale_input_called is set

    def make(self, scheduler: Any, config: Any) -> None:
        self.count = len(scheduler.sigmas)
        self.scales: dict[int, Tensor] = {}

    @staticmethod
    def scale(scheduler: Any, sigma: Tensor) -> Tensor:
        return (sigma**2 + 1) ** 0.5


class EDMInputScales(InputScales):
    divides = False

    @staticmethod
    def scale(scheduler: Any, sigma: Tensor) -> Tensor:
        return scheduler._get_conditioning_c_in(sigma)


class HeunInputScales(InputScales):
    marks = False


# ------------------------------------------------------------------------------------------------------- methods


def _unfit(x: Any, n: Any, timesteps: Any) -> str | None:
    """Why the noising of these is left to diffusers; None if it is not."""
    reason = unfit(x, n)
    if reason is not None:
        return reason.replace("model output", "noise")
    if x.dtype is not n.dtype:
        return "sample and noise differ in dtype"
    if not isinstance(timesteps, Tensor) or timesteps.ndim > 1 or x.ndim < 1:
        return "timesteps are no tensor of one a sample"
    if timesteps.ndim == 1 and timesteps.shape[0] not in (1, x.shape[0]):
        return "timesteps are not one a sample"
    return None


def _by_timestep(original: Callable, name: str, cache: Cache, velocity: bool) -> Callable:
    """Noising, or velocities, with coefficients that are looked up by the timestep."""

    def run(scheduler, x, n, timesteps):
        if type(timesteps) is Tensor and not _is_compiling():
            found = cache(scheduler)
            if found.fast:
                done = (found.velocity if velocity else found.noise).run(timesteps, x, n)
                if done is not None:
                    fused[name] += 1
                    return done
        reason = _unfit(x, n, timesteps)
        if reason is None and timesteps.dtype not in (torch.int64, torch.int32):
            reason = "timesteps are no integers"
        traced = _is_compiling()
        if reason is None:
            found = cache(scheduler) if not traced or not cache.enabled else None
            reason = found and found.reason
        if reason is not None:
            return left(name, reason, original, scheduler, x, n, timesteps)
        count(name)
        if timesteps.device != x.device:
            timesteps = timesteps.to(x.device)
        if not traced:
            return (found.velocity if velocity else found.noise)(timesteps, x, n)
        bars = scheduler.alphas_cumprod.to(x.device)[timesteps].double()
        alpha, sigma = bars.sqrt(), (1 - bars).sqrt()
        return ops.noise(x, -sigma, alpha, n)[0] if velocity else ops.noise(x, alpha, sigma, n)[0]

    return run


def add_noise_by_timestep(original: Callable, name: str, cache: Cache) -> Callable:
    run = _by_timestep(original, name, cache, velocity=False)

    @wraps(original)
    def add_noise(self, original_samples, noise, timesteps):
        return run(self, original_samples, noise, timesteps)

    return add_noise


def get_velocity_by_timestep(original: Callable, name: str, cache: Cache) -> Callable:
    run = _by_timestep(original, name, cache, velocity=True)

    @wraps(original)
    def get_velocity(self, sample, noise, timesteps):
        return run(self, sample, noise, timesteps)

    return get_velocity


def _by_sigma(original: Callable, name: str, cache: Cache, velocity: bool = False) -> Callable:
    """The same with coefficients that are looked up by the index of the step: the scheduler's own, or that of the
    timestep."""

    def run(scheduler, x, n, timesteps, call):
        found = cache.traced(scheduler) if _is_compiling() else cache(scheduler)
        if found.fast and not _is_compiling():
            index = found.fast_index(scheduler, timesteps, velocity)
            if index is not None:
                done = (found.velocity if velocity else found.noise).run(index, x, n)
                if done is not None:
                    fused[name] += 1
                    return done
        reason = found.reason or _unfit(x, n, timesteps)
        if reason is None and timesteps.ndim != 1:
            reason = "timesteps are no tensor of one a sample"
        if reason is None and velocity and not timesteps.is_floating_point():
            reason = "an integer for a timestep"
        if reason is None:
            index = scheduler._begin_index
            if velocity or index is None:
                if timesteps.device != x.device:
                    timesteps = timesteps.to(x.device)
                index = found.find(timesteps)
            elif scheduler._step_index is not None:
                index = scheduler._step_index
            if index is None or (type(index) is int and not 0 <= index < found.count):
                reason = "a timestep is none of the scheduler's"
        if reason is not None:
            return left(name, reason, call)
        count(name)
        return (found.velocity if velocity else found.noise)(index, x, n)

    return run


def add_noise_by_sigma(original: Callable, name: str, cache: Cache) -> Callable:
    run = _by_sigma(original, name, cache)

    @wraps(original)
    def add_noise(self, original_samples, noise, timesteps):
        return run(self, original_samples, noise, timesteps, lambda: original(self, original_samples, noise, timesteps))

    return add_noise


def get_velocity_by_sigma(original: Callable, name: str, cache: Cache) -> Callable:
    run = _by_sigma(original, name, cache, velocity=True)

    @wraps(original)
    def get_velocity(self, sample, noise, timesteps):
        return run(self, sample, noise, timesteps, lambda: original(self, sample, noise, timesteps))

    return get_velocity


def scale_noise(original: Callable, name: str, cache: Cache) -> Callable:
    """Of FlowMatchEulerDiscreteScheduler."""
    run = _by_sigma(original, name, cache)

    @wraps(original)
    def scaled(self, sample, timestep, noise=None):
        return run(self, sample, noise, timestep, lambda: original(self, sample, timestep, noise))

    return scaled


def scale_noise_of_step(original: Callable, name: str, cache: Cache) -> Callable:
    """Of FlowMatchHeunDiscreteScheduler: at the level of the step index, whatever the timestep."""

    @wraps(original)
    def scaled(self, sample, timestep, noise):
        found = cache.traced(self) if _is_compiling() else cache(self)
        k = self._step_index
        if found.fast and k is not None and 0 <= k < found.count and not _is_compiling():
            done = found.noise.run(k, sample, noise)
            if done is not None:
                fused[name] += 1
                return done
        reason = found.reason or unfit(sample, noise)
        if reason is None and sample.dtype is not noise.dtype:
            reason = "sample and noise differ in dtype"
        if reason is None:
            if self._step_index is None:
                self._init_step_index(timestep)
            k = self._step_index
            if not 0 <= k < found.count:
                reason = "the step index is beyond the schedule"
        if reason is not None:
            return left(name, reason, original, self, sample, timestep, noise)
        count(name)
        return found.noise(k, sample, noise)

    return scaled


def scale_model_input(original: Callable, name: str, cache: Cache) -> Callable:
    """x by a number, as diffusers does it. What is saved is the arithmetic that makes the number."""

    @wraps(original)
    def scaled(self, sample, timestep):
        compiling = _is_compiling()
        found = cache.traced(self) if compiling else cache(self)
        reason = found.reason
        if reason is None and compiling:
            reason = "compiled: one operation either way"
        if reason is None and not isinstance(sample, Tensor):
            reason = "sample is no tensor"
        if reason is None:
            if self._step_index is None:
                self._init_step_index(timestep)
            k = self._step_index
            if not 0 <= k < found.count:
                reason = "the step index is beyond the schedule"
        if reason is not None:
            return left(name, reason, original, self, sample, timestep)
        count(name)
        scale = cached(found.scales, k, lambda: found.scale(self, self.sigmas[k]))
        if found.marks:
            self.is_scale_input_called = True
        return sample / scale if found.divides else sample * scale

    return scaled


# ------------------------------------------------------------------------------- methods that several schedulers have

BY_TIMESTEP = {
    "add_noise": Method(add_noise_by_timestep, NoiseByTimestep, {"add_noise": ("9abf10ec89df",)}),
    "get_velocity": Method(get_velocity_by_timestep, NoiseByTimestep, {"get_velocity": ("98be1a15e178",)}),
}
INDEX_OF_TIMESTEP = {"index_for_timestep": ("5edad51bfd3b",)}
ADD_NOISE_BY_SIGMA = {"add_noise": ("1e111a957217",)} | INDEX_OF_TIMESTEP
SCALE_MODEL_INPUT = {"scale_model_input": ("a300109eae99",)}
