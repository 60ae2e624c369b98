"""``step`` of diffusers' schedulers, fused: their arguments, results, state, draws and errors.

Each function takes the method that it stands for and gives the one to put in its place. What is not as expected goes to
the method that was there, before anything of the scheduler's state is changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .counting import count, left
from .plans import STEPS, UNTRACED, Refused, StepPlan

_is_compiling = torch.compiler.is_compiling
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})


def unfit(x: Any, m: Any, dtypes: frozenset[torch.dtype] = _FLOATS) -> str | None:
    """Why a step of these is left to diffusers; None if it is not."""
    if not (isinstance(x, Tensor) and isinstance(m, Tensor)):
        return "sample or model output is no tensor"
    if x.shape != m.shape:
        return "sample and model output differ in shape"
    if x.device != m.device:
        return "sample and model output are on different devices"
    if x.dtype not in dtypes or m.dtype not in dtypes:
        return f"sample or model output of dtype {x.dtype if x.dtype not in dtypes else m.dtype}"
    return None


class Maker:
    """Gives the plan of a scheduler: the one that is kept, or a new one.

    Args:
        make: the class of the plan.
        refuse: says why a scheduler is left alone whatever its config, or None.

    ``enabled``: False when what calls this should not be called any more.
    """

    def __init__(self, make: type, refuse: Callable[[Any], str | None], where: str = STEPS):
        self.make, self.refuse, self.where = make, refuse, where
        self.enabled = True

    def __call__(self, scheduler: Any) -> Any:
        if not self.enabled:
            return _UNDONE
        held = scheduler.__dict__
        plan = held.get(self.where)
        if plan is None or not plan.current(held):
            plan = self.build(scheduler)
        return plan

    def build(self, scheduler: Any) -> Any:
        """Make the plan anew and keep it; one that was made from equal numbers serves again."""
        reason, plan = self.refuse(scheduler), None
        before = scheduler.__dict__.get(self.where)
        if reason is None and before is not None and before.reason is None and before.serves(scheduler):
            return before
        if reason is None:
            try:
                plan = self.make(scheduler)
            except Exception as error:  # whatever is odd about a scheduler, its own method has to say
                reason = str(error) or type(error).__name__
        if plan is None:
            names, others = self.make.tensor_names, getattr(self.make, "other_names", ())
            plan = Refused(scheduler, names, others, reason)
        scheduler.__dict__[self.where] = plan
        return plan

    @UNTRACED
    def untraced(self, scheduler: Any) -> Any:
        return self(scheduler)


class _Undone:
    reason = "patch() was undone"


_UNDONE = _Undone()


def plan_of(maker: Maker, scheduler: Any) -> Any:
    """The plan; while a program is traced, one that is there is taken without a break of the graph."""
    if not _is_compiling():
        return maker(scheduler)
    if not maker.enabled:
        return _UNDONE
    plan = getattr(scheduler, maker.where, None)
    if plan is None or any(getattr(scheduler, name, None) is not tensor for name, tensor in plan.tensors):
        return maker.untraced(scheduler)
    return plan


@UNTRACED
def _number(plan: StepPlan, timestep: Any) -> Any:
    return plan.value(timestep)


def _index(plan: StepPlan, timestep: Any) -> int | None:
    """``timestep`` as an integer of the host; None for what indexes no schedule."""
    if type(timestep) is int:
        return timestep
    number = _number(plan, timestep) if _is_compiling() else plan.value(timestep)
    return number if type(number) is int else None


@UNTRACED
def _start(scheduler: Any, plan: StepPlan, timestep: Any) -> None:
    """Set the scheduler's step index as it does itself; a view of its own timesteps is not waited for."""
    if isinstance(timestep, Tensor) and not timestep.is_cpu and scheduler.begin_index is None:
        at = plan.position(timestep)
        if at is not None:
            scheduler._step_index = scheduler.index_for_timestep(plan.host_times[at], plan.host_times)
            return
    scheduler._init_step_index(timestep)


def _step_index(scheduler: Any, plan: StepPlan, timestep: Any) -> int:
    if scheduler._step_index is None:
        _start(scheduler, plan, timestep)
    return scheduler._step_index


def _whole(timestep: Any) -> bool:
    """What schedulers with sigmas refuse: integers, which are taken for indices."""
    return isinstance(timestep, int) or (isinstance(timestep, Tensor) and timestep.dtype in (torch.int32, torch.int64))


def _usable(plan: StepPlan, k: int | None) -> bool:
    return k is not None and 0 <= k < len(plan.usable) and plan.usable[k]


def _promoted(x: Tensor, m: Tensor) -> torch.dtype:
    return x.dtype if x.dtype is m.dtype else torch.promote_types(x.dtype, m.dtype)


def results(output: type, *names: str) -> Callable:
    """``output`` made from values in the order of ``names``, without what its constructor spends on finding its fields:
    the object is the same, which is tried once; where it is not, the constructor is called."""
    put = OrderedDict.__setitem__

    def quick(*values: Any) -> Any:
        made = output.__new__(output)
        held = made.__dict__
        for name, value in zip(names, values):
            held[name] = value
            put(made, name, value)
        return made

    values = tuple(torch.zeros(1) for _ in names)
    try:
        made, expected = quick(*values), output(**dict(zip(names, values)))
        same = list(made) == list(expected) == list(names) and set(made.__dict__) == set(expected.__dict__)
        same = same and all(made[name] is getattr(made, name) is value for name, value in zip(names, values))
    except Exception:  # whatever it is, it is not made like that
        same = False
    return quick if same else lambda *values: output(**dict(zip(names, values)))


NO_ROW = "no finite coefficients for this step"


def ddpm(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample", "pred_original_sample")
    held = original.__globals__

    @wraps(original)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        plan = plan_of(maker, self)
        reason, m, variance = plan.reason, model_output, None
        if reason is None:
            if plan.learned and isinstance(m, Tensor) and isinstance(sample, Tensor) and m.ndim == sample.ndim > 1:
                if m.shape[1] == 2 * sample.shape[1]:
                    m, variance = torch.split(m, sample.shape[1], dim=1)
                else:
                    reason = "no variance was predicted"
            reason = reason or unfit(sample, m)
        if reason is None:
            t = _index(plan, timestep)
            k = plan.at.get(t)
            if not _usable(plan, k):
                reason = NO_ROW
        if reason is not None:
            return left(name, reason, original, self, model_output, timestep, sample, generator, return_dict)
        count(name)
        dtype, threshold = _promoted(sample, m), None
        if plan.quantile is not None:
            threshold = plan.threshold(k, sample, m, dtype)
        z = None
        if t > 0:
            z = held["randn_tensor"](m.shape, generator=generator, device=m.device, dtype=m.dtype)
        previous, x0, _ = plan.rows(
            k, sample, m, clip=plan.clip, noise=z, log_variance=variance, threshold=threshold, dtype=dtype
        )
        if not return_dict:
            return previous, x0
        return made(previous, x0)

    return step


def ddim(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample", "pred_original_sample")
    held = original.__globals__

    @wraps(original)
    def step(
        self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None,
        variance_noise=None, return_dict=True,
    ):  # fmt: skip
        plan = plan_of(maker, self)
        reason = plan.reason or unfit(sample, model_output)
        if reason is None:
            k = _index(plan, timestep)
            if not isinstance(eta, (int, float)):
                reason = "eta is no number"
            elif k is None or not 0 <= k < plan.count:
                reason = NO_ROW
            elif eta > 0 and variance_noise is not None and not _like(variance_noise, sample, generator):
                reason = "the variance noise does not fit"
            else:
                rows, usable = plan.choose(eta, bool(use_clipped_model_output))
                reason = None if usable[k] else NO_ROW
        if reason is not None:
            return left(
                name, reason, original, self, model_output, timestep, sample, eta, use_clipped_model_output, generator,
                variance_noise, return_dict,
            )  # fmt: skip
        count(name)
        dtype, threshold, z = _promoted(sample, model_output), None, None
        if plan.quantile is not None:
            threshold = plan.threshold(k, sample, model_output, dtype)
        if eta > 0:
            z = variance_noise
            if z is None:
                m = model_output
                z = held["randn_tensor"](m.shape, generator=generator, device=m.device, dtype=m.dtype)
        previous, x0, _ = rows(k, sample, model_output, clip=plan.clip, noise=z, threshold=threshold, dtype=dtype)
        if not return_dict:
            return previous, x0
        return made(previous, x0)

    return step


def _like(z: Any, x: Tensor, generator: Any) -> bool:
    """Whether noise that was given is noise for x."""
    if generator is not None or not isinstance(z, Tensor):
        return False
    return z.shape == x.shape and z.device == x.device and z.dtype == x.dtype


def lcm(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample", "denoised")
    held = original.__globals__

    @wraps(original)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        plan = plan_of(maker, self)
        reason = plan.reason or unfit(sample, model_output)
        if reason is None:
            k = _step_index(self, plan, timestep)
            if not _usable(plan, k):
                reason = NO_ROW
            elif _index(plan, timestep) != plan.times[k]:
                reason = "the timestep is not that of the step index"
        if reason is not None:
            return left(name, reason, original, self, model_output, timestep, sample, generator, return_dict)
        count(name)
        m, dtype, threshold, z = model_output, _promoted(sample, model_output), None, None
        if plan.quantile is not None:
            threshold = plan.threshold(k, sample, m, dtype)
        if plan.draws[k]:
            z = held["randn_tensor"](m.shape, generator=generator, device=m.device, dtype=dtype)
        clips = plan.clips
        previous, denoised, entry = plan.rows(
            k, sample, m, clip=plan.clip, noise=z, threshold=threshold, dtype=dtype, return_x0=not clips,
            return_entry=clips,
        )  # fmt: skip
        if clips:
            denoised = entry.to(dtype)
        self._step_index += 1
        if not return_dict:
            return previous, denoised
        return made(previous, denoised)

    return step


def _sigma_step(scheduler: Any, plan: StepPlan, timestep: Any, x: Any, m: Any) -> tuple[int | None, str | None]:
    """(index of the step, None) or (None, reason) for a scheduler that computes in float32 whatever it is given."""
    reason = plan.reason or unfit(x, m, NARROW)
    if reason is None and _whole(timestep):
        reason = "an integer for a timestep"
    if reason is None:
        k = _step_index(scheduler, plan, timestep)
        if _usable(plan, k):
            return k, None
        reason = NO_ROW
    return None, reason


def euler(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample", "pred_original_sample")

    @wraps(original)
    def step(
        self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
        generator=None, return_dict=True,
    ):  # fmt: skip
        plan = plan_of(maker, self)
        reason = None if s_churn == 0 else "s_churn"
        if not self.is_scale_input_called:
            reason = "scale_model_input was not called"
        if reason is None:
            k, reason = _sigma_step(self, plan, timestep, sample, model_output)
        if reason is not None:
            return left(
                name, reason, original, self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                generator, return_dict,
            )  # fmt: skip
        count(name)
        previous, _, x0 = plan.rows(
            k, sample, model_output, dtype=model_output.dtype, return_x0=False, return_entry=not plan.given
        )
        if plan.given:
            x0 = model_output
        self._step_index += 1
        if not return_dict:
            return previous, x0
        return made(previous, x0)

    return step


def edm_euler(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample", "pred_original_sample")

    @wraps(original)
    def step(
        self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
        generator=None, return_dict=True, pred_original_sample=None,
    ):  # fmt: skip
        plan = plan_of(maker, self)
        reason = None if s_churn == 0 else "s_churn"
        if pred_original_sample is not None:
            reason = "pred_original_sample was given"
        if not self.is_scale_input_called:
            reason = "scale_model_input was not called"
        if reason is None:
            k, reason = _sigma_step(self, plan, timestep, sample, model_output)
        if reason is not None:
            return left(
                name, reason, original, self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                generator, return_dict, pred_original_sample,
            )  # fmt: skip
        count(name)
        previous, _, x0 = plan.rows(
            k, sample, model_output, dtype=model_output.dtype, return_x0=False, return_entry=True
        )
        self._step_index += 1
        if not return_dict:
            return previous, x0
        return made(previous, x0)

    return step


def euler_ancestral(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample", "pred_original_sample")
    held = original.__globals__

    @wraps(original)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        plan, m = plan_of(maker, self), model_output
        reason = None if self.is_scale_input_called else "scale_model_input was not called"
        if reason is None:
            k, reason = _sigma_step(self, plan, timestep, sample, m)
        if reason is not None:
            return left(name, reason, original, self, m, timestep, sample, generator, return_dict)
        count(name)
        z = held["randn_tensor"](m.shape, dtype=m.dtype, device=m.device, generator=generator)
        previous, _, x0 = plan.rows(k, sample, m, noise=z, dtype=m.dtype, return_x0=False, return_entry=True)
        self._step_index += 1
        if not return_dict:
            return previous, x0
        return made(previous, x0)

    return step


def _second(scheduler: Any, plan: Any, k: int, x: Tensor, began: torch.dtype) -> str | None:
    """Why this second call of a step of Heun's method is left to diffusers; None if it is not."""
    if not 1 <= k <= plan.count or scheduler.dt is not plan.step(k - 1):
        return "the first call of this step was not fused"
    start, slope = scheduler.sample, scheduler.prev_derivative
    if not (isinstance(start, Tensor) and start.shape == x.shape and start.device == x.device):
        return "the sample has changed in shape or device"
    return None if start.dtype == began and isinstance(slope, Tensor) else "the sample has changed in dtype"


def heun(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample", "pred_original_sample")

    @wraps(original)
    def step(self, model_output, timestep, sample, return_dict=True):
        plan, first = plan_of(maker, self), True
        reason = plan.reason or unfit(sample, model_output)
        if reason is None and sample.dtype is not model_output.dtype:
            reason = "sample and model output differ in dtype"
        if reason is None:
            k, first = _step_index(self, plan, timestep), self.dt is None
            if not first:
                reason = _second(self, plan, k, sample, sample.dtype)
            row = k if first else k + plan.count
            if reason is None and not (k < plan.count and _usable(plan, row)):
                reason = NO_ROW
        if reason is not None:
            return left(name, reason, original, self, model_output, timestep, sample, return_dict)
        count(name)
        threshold = None if plan.quantile is None else plan.threshold(row, sample, model_output, sample.dtype)
        past = () if first else (self.sample, self.prev_derivative)
        previous, x0, slope = plan.rows(
            row, sample, model_output, clip=plan.clip, history=past, threshold=threshold, return_entry=first
        )
        if first:
            self.prev_derivative = slope.to(sample.dtype)
            self.dt, self.sample = plan.step(k), sample
        else:
            self.prev_derivative = self.dt = self.sample = None
        self._step_index += 1
        if not return_dict:
            return previous, x0
        return made(previous, x0)

    return step


def flow_heun(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample")

    @wraps(original)
    def step(
        self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
        generator=None, return_dict=True,
    ):  # fmt: skip
        plan, first = plan_of(maker, self), True
        reason = plan.reason or ("s_churn" if s_churn != 0 else unfit(sample, model_output, NARROW))
        if reason is None and _whole(timestep):
            reason = "an integer for a timestep"
        if reason is None:
            k, first = _step_index(self, plan, timestep), self.dt is None
            if not first:
                reason = _second(self, plan, k, sample, torch.float32)
            row = k if first else k + plan.count
            if reason is None and not (k < plan.count and _usable(plan, row)):
                reason = NO_ROW
        if reason is not None:
            return left(
                name, reason, original, self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                generator, return_dict,
            )  # fmt: skip
        count(name)
        past = () if first else (self.sample, self.prev_derivative)
        previous, _, slope = plan.rows(
            row, sample, model_output, history=past, dtype=model_output.dtype, return_x0=False, return_entry=first
        )
        if first:
            self.prev_derivative, self.dt, self.sample = slope, plan.step(k), sample.to(torch.float32)
        else:
            self.prev_derivative = self.dt = self.sample = None
        self._step_index += 1
        if not return_dict:
            return (previous,)
        return made(previous)

    return step


def flow_euler(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample")
    held = original.__globals__

    @wraps(original)
    def step(
        self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
        generator=None, per_token_timesteps=None, return_dict=True,
    ):  # fmt: skip
        plan = plan_of(maker, self)
        if per_token_timesteps is not None:
            k, reason = None, "per_token_timesteps"
        elif plan.reason is None and plan.draws and "randn_tensor" not in held:
            k, reason = None, "stochastic_sampling of this version of diffusers"
        else:
            k, reason = _sigma_step(self, plan, timestep, sample, model_output)
        if reason is not None:
            return left(
                name, reason, original, self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                generator, per_token_timesteps, return_dict,
            )  # fmt: skip
        count(name)
        z = None
        if plan.draws:
            z = held["randn_tensor"](sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
        previous, _, _ = plan.rows(k, sample, model_output, noise=z, dtype=model_output.dtype, return_x0=False)
        self._step_index += 1
        if not return_dict:
            return (previous,)
        return made(previous)

    return step


def _past(outputs: list, count: int, x: Tensor) -> tuple[Tensor, ...] | None:
    """The latest ``count`` of the estimates kept, the latest first; None if they are not there or not as x."""
    if not count:
        return ()
    if count > len(outputs):
        return None
    past = tuple(outputs[: -count - 1 : -1])
    for entry in past:
        if not isinstance(entry, Tensor) or entry.shape != x.shape or entry.device != x.device:
            return None
    return past


def dpm_solver(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample")
    held = original.__globals__

    @wraps(original)
    def step(self, model_output, timestep, sample, generator=None, variance_noise=None, return_dict=True):
        plan, m = plan_of(maker, self), model_output
        reason = plan.reason or unfit(sample, m, NARROW)
        if reason is None and sample.dtype is not m.dtype:
            reason = "sample and model output differ in dtype"
        if reason is None and self.num_inference_steps is None:
            reason = "set_timesteps was not called"
        if reason is None:
            k = _step_index(self, plan, timestep)
            order = min(plan.order, self.lower_order_nums + 1)
            if k == plan.first_order_at:
                order = 1
            elif k == plan.second_order_at:
                order = min(order, 2)
            past = _past(self.model_outputs, order - 1, m)
            row = (order - 1) * plan.count + k
            if past is None or not 0 <= k < plan.count or not plan.usable[row]:
                reason = NO_ROW
            elif plan.sde and variance_noise is not None and not _noise_for(variance_noise, m):
                reason = "the variance noise does not fit"
        if reason is not None:
            return left(name, reason, original, self, m, timestep, sample, generator, variance_noise, return_dict)
        count(name)
        z = threshold = None
        if plan.quantile is not None:
            threshold = plan.threshold(row, sample, m, m.dtype)
        if plan.sde:
            if variance_noise is None:
                z = held["randn_tensor"](m.shape, generator=generator, device=m.device, dtype=torch.float32)
            else:
                z = variance_noise.to(device=m.device, dtype=torch.float32)
        previous, kept, _ = plan.rows(row, sample, m, history=past, noise=z, threshold=threshold)
        outputs = self.model_outputs
        for i in range(plan.order - 1):
            outputs[i] = outputs[i + 1]
        outputs[-1] = kept
        if self.lower_order_nums < plan.order:
            self.lower_order_nums += 1
        self._step_index += 1
        if not return_dict:
            return (previous,)
        return made(previous)

    return step


def _noise_for(z: Any, m: Tensor) -> bool:
    return isinstance(z, Tensor) and z.shape == m.shape


def unipc(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample")

    @wraps(original)
    def step(self, model_output, timestep, sample, return_dict=True):
        plan, m = plan_of(maker, self), model_output
        reason = plan.reason or unfit(sample, m)
        if reason is None and sample.dtype is not m.dtype:
            reason = "sample and model output differ in dtype"
        if reason is None and self.num_inference_steps is None:
            reason = "set_timesteps was not called"
        if reason is None:
            k, last = _step_index(self, plan, timestep), self.last_sample
            corrects = k > 0 and k - 1 not in self.disable_corrector and last is not None
            order = min(plan.order, len(plan.times) - k) if plan.lowers else plan.order
            order = min(order, self.lower_order_nums + 1)
            past = _past(self.model_outputs, order - 1, m)
            row = (3 * (order - 1) + 2 * corrects) * plan.count + k
            if past is None or not 0 <= k < plan.count or order < 1 or not plan.usable[row]:
                reason = NO_ROW
            elif corrects:
                before = _past(self.model_outputs, self.this_order, m)
                correction = (3 * (self.this_order - 1) + 1) * plan.count + k
                if before is None or last.shape != m.shape or last.device != m.device or not plan.usable[correction]:
                    reason = NO_ROW
        if reason is not None:
            return left(name, reason, original, self, m, timestep, sample, return_dict)
        count(name)
        at = correction if corrects else row
        threshold = None if plan.quantile is None else plan.threshold(at, sample, m, m.dtype)
        if corrects:
            sample, kept, _ = plan.rows(at, sample, m, history=(last, *before), threshold=threshold)
            previous, _, _ = plan.rows(row, sample, kept, history=past, return_x0=False)
        else:
            previous, kept, _ = plan.rows(at, sample, m, history=past, threshold=threshold)
        outputs, times = self.model_outputs, self.timestep_list
        for i in range(plan.order - 1):
            outputs[i], times[i] = outputs[i + 1], times[i + 1]
        outputs[-1], times[-1] = kept, timestep
        self.this_order, self.last_sample = order, sample
        if self.lower_order_nums < plan.order:
            self.lower_order_nums += 1
        self._step_index += 1
        if not return_dict:
            return (previous,)
        return made(previous)

    return step
