"""``add_noise``, ``scale_noise``, ``get_velocity`` and ``scale_model_input`` of diffusers' schedulers, fused.

As in ``step``, each function takes the method that it stands for and gives the one to put in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...backends.rows import cached
from .call_counts import count, fused, left
from .coefficient_cache import UNTRACED
from .step import Maker, plan_of, unfit

_is_compiling = torch.compiler.is_compiling


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


def _of_bars(original: Callable, name: str, maker: Maker, velocity: bool) -> Callable:
    """Coefficients are looked up by the timestep."""

    def run(scheduler, x, n, timesteps):
        if type(timesteps) is Tensor and not _is_compiling():
            plan = maker(scheduler)
            if plan.quick:
                done = (plan.velocity if velocity else plan.noise).run(timesteps, x, n)
                if done is not None:
                    fused[name] += 1
                    return done
        reason = _unfit(x, n, timesteps)
        if reason is None and timesteps.dtype not in (torch.int64, torch.int32):
            reason = "timesteps are no integers"
        traced = _is_compiling()
        if reason is None:
            plan = maker(scheduler) if not traced or not maker.enabled else None
            reason = plan and plan.reason
        if reason is not None:
            return left(name, reason, original, scheduler, x, n, timesteps)
        count(name)
        if timesteps.device != x.device:
            timesteps = timesteps.to(x.device)
        if not traced:
            return (plan.velocity if velocity else plan.noise)(timesteps, x, n)
        bars = scheduler.alphas_cumprod.to(x.device)[timesteps].double()
        alpha, sigma = bars.sqrt(), (1 - bars).sqrt()
        return ops.noise(x, -sigma, alpha, n)[0] if velocity else ops.noise(x, alpha, sigma, n)[0]

    return run


def add_noise_by_time(original: Callable, name: str, maker: Maker) -> Callable:
    run = _of_bars(original, name, maker, velocity=False)

    @wraps(original)
    def add_noise(self, original_samples, noise, timesteps):
        return run(self, original_samples, noise, timesteps)

    return add_noise


def get_velocity_by_time(original: Callable, name: str, maker: Maker) -> Callable:
    run = _of_bars(original, name, maker, velocity=True)

    @wraps(original)
    def get_velocity(self, sample, noise, timesteps):
        return run(self, sample, noise, timesteps)

    return get_velocity


@UNTRACED
def _find(plan: Any, timesteps: Tensor) -> int | Tensor | None:
    return plan.find(timesteps)


def _of_sigmas(original: Callable, name: str, maker: Maker, velocity: bool = False) -> Callable:
    """Coefficients are looked up by the index of the step: the scheduler's own, or that of the timestep."""

    def run(scheduler, x, n, timesteps, call):
        plan = plan_of(maker, scheduler)
        if plan.quick and not _is_compiling():
            index = plan.quick_index(scheduler, timesteps, velocity)
            if index is not None:
                done = (plan.velocity if velocity else plan.noise).run(index, x, n)
                if done is not None:
                    fused[name] += 1
                    return done
        reason = plan.reason or _unfit(x, n, timesteps)
        if reason is None and timesteps.ndim != 1:
            reason = "timesteps are no tensor of one a sample"
        if reason is None and velocity and not timesteps.is_floating_point():
            reason = "an integer for a timestep"
        if reason is None:
            index = scheduler._begin_index
            if velocity or index is None:
                if timesteps.device != x.device:
                    timesteps = timesteps.to(x.device)
                index = _find(plan, timesteps)
            elif scheduler._step_index is not None:
                index = scheduler._step_index
            if index is None or (type(index) is int and not 0 <= index < plan.count):
                reason = "a timestep is none of the scheduler's"
        if reason is not None:
            return left(name, reason, call)
        count(name)
        return (plan.velocity if velocity else plan.noise)(index, x, n)

    return run


def add_noise_by_index(original: Callable, name: str, maker: Maker) -> Callable:
    run = _of_sigmas(original, name, maker)

    @wraps(original)
    def add_noise(self, original_samples, noise, timesteps):
        return run(self, original_samples, noise, timesteps, lambda: original(self, original_samples, noise, timesteps))

    return add_noise


def get_velocity_by_index(original: Callable, name: str, maker: Maker) -> Callable:
    run = _of_sigmas(original, name, maker, velocity=True)

    @wraps(original)
    def get_velocity(self, sample, noise, timesteps):
        return run(self, sample, noise, timesteps, lambda: original(self, sample, noise, timesteps))

    return get_velocity


def scale_noise(original: Callable, name: str, maker: Maker) -> Callable:
    """Of FlowMatchEulerDiscreteScheduler."""
    run = _of_sigmas(original, name, maker)

    @wraps(original)
    def scaled(self, sample, timestep, noise=None):
        return run(self, sample, noise, timestep, lambda: original(self, sample, timestep, noise))

    return scaled


def scale_noise_of_step(original: Callable, name: str, maker: Maker) -> Callable:
    """Of FlowMatchHeunDiscreteScheduler: at the level of the step index, whatever the timestep."""

    @wraps(original)
    def scaled(self, sample, timestep, noise):
        plan = plan_of(maker, self)
        k = self._step_index
        if plan.quick and k is not None and 0 <= k < plan.count and not _is_compiling():
            done = plan.noise.run(k, sample, noise)
            if done is not None:
                fused[name] += 1
                return done
        reason = plan.reason or unfit(sample, noise)
        if reason is None and sample.dtype is not noise.dtype:
            reason = "sample and noise differ in dtype"
        if reason is None:
            if self._step_index is None:
                self._init_step_index(timestep)
            k = self._step_index
            if not 0 <= k < plan.count:
                reason = "the step index is beyond the schedule"
        if reason is not None:
            return left(name, reason, original, self, sample, timestep, noise)
        count(name)
        return plan.noise(k, sample, noise)

    return scaled


def scale_model_input(original: Callable, name: str, maker: Maker) -> Callable:
    """x by a number, as it was: what is saved is the arithmetic that makes the number, which is kept."""

    @wraps(original)
    def scaled(self, sample, timestep):
        plan = plan_of(maker, self)
        reason = plan.reason
        if reason is None and _is_compiling():
            reason = "compiled: one operation either way"
        if reason is None and not isinstance(sample, Tensor):
            reason = "sample is no tensor"
        if reason is None:
            if self._step_index is None:
                self._init_step_index(timestep)
            k = self._step_index
            if not 0 <= k < plan.count:
                reason = "the step index is beyond the schedule"
        if reason is not None:
            return left(name, reason, original, self, sample, timestep)
        count(name)
        scale = cached(plan.scales, k, lambda: plan.scale(self, self.sigmas[k]))
        if plan.marks:
            self.is_scale_input_called = True
        return sample / scale if plan.divides else sample * scale

    return scaled
