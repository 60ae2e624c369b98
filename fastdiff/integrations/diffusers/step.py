"""``step`` of diffusers' schedulers, fused: their arguments, results, state, draws and errors.

Each function takes the method that it stands for and gives the one to put in its place. What is not as expected goes to
the method that was there, before anything of the scheduler's state is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ...backends.native import torch_noise
from ...backends.native.operations import _C
from ...backends.native.prepared import number
from ...ops.prepared import DRAW, DRAW_FLOAT, ENTRY, MODEL_DTYPE, ONE_DTYPE, X0
from .call_counts import count, fused, left
from .coefficient_cache import STEPS, UNTRACED, Refused, StepPlan, is_current
from .source_digests import RANDN_TENSOR, fingerprint

_is_compiling = torch.compiler.is_compiling
_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
_HALVES = frozenset({torch.float16, torch.bfloat16})
NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})


def unfit(x: Any, m: Any, dtypes: frozenset[torch.dtype] = _FLOATS, plan: Any = None) -> str | None:
    """Why a step of these is left to diffusers; None if it is not."""
    if not (isinstance(x, Tensor) and isinstance(m, Tensor)):
        return "sample or model output is no tensor"
    if x.shape != m.shape:
        return "sample and model output differ in shape"
    if x.device != m.device:
        return "sample and model output are on different devices"
    if x.dtype not in dtypes or m.dtype not in dtypes:
        return f"sample or model output of dtype {x.dtype if x.dtype not in dtypes else m.dtype}"
    if getattr(plan, "quantile", None) is not None and x.ndim < 3:
        return "thresholding of samples without height and width"
    return None


def _promotes(plan: Any, timestep: Any, x: Tensor, m: Tensor) -> str | None:
    """Why a step of a scheduler that looks its coefficients up by the timestep is left to it: those of a timestep [1]
    have a dimension, and promote half precision to float32; an output that is x0 itself keeps its dtype."""
    if plan.kind == "sample" and x.dtype is not m.dtype:
        return "sample and predicted sample differ in dtype"
    if isinstance(timestep, Tensor) and timestep.ndim and torch.promote_types(x.dtype, m.dtype) in _HALVES:
        return "a timestep of shape [1] with samples in half precision"
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
        if plan is None or not is_current(plan.watched, held):
            plan = self.build(scheduler)
        return plan

    def build(self, scheduler: Any) -> Any:
        """Make the plan anew and keep it; one that was made from equal numbers serves again."""
        reason, plan = self.refuse(scheduler), None
        before, lasting = scheduler.__dict__.get(self.where), reason is None
        if reason is None:
            try:
                plan = before.serving(scheduler) if before is not None and before.lasting else None
                plan = self.make(scheduler) if plan is None else plan
            except Exception as error:  # whatever is odd about a scheduler, its own method has to say
                reason = str(error) or type(error).__name__
        if plan is None:
            names, others = self.make.tensor_names, getattr(self.make, "other_names", ())
            plan = Refused(scheduler, names, others, reason, lasting)
        scheduler.__dict__[self.where] = plan
        return plan

    @UNTRACED
    def untraced(self, scheduler: Any) -> Any:
        return self(scheduler)


class _Undone:
    reason, quick = "patch() was undone", False


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


_FLOAT32 = torch.float32


def _quick_index(scheduler: Any, plan: Any, timestep: Any) -> int | None:
    """The step index of a scheduler with sigmas, for the quick way; None if it has none yet, or anything is unusual."""
    if not plan.quick or type(timestep) is not Tensor or timestep.dtype is not _FLOAT32 or _is_compiling():
        return None
    k = scheduler._step_index
    return k if k is not None and 0 <= k < len(plan.usable) and plan.usable[k] else None


def _whole(timestep: Any) -> bool:
    """What schedulers with sigmas refuse: integers, which are taken for indices."""
    return isinstance(timestep, int) or (isinstance(timestep, Tensor) and timestep.dtype in (torch.int32, torch.int64))


def _usable(plan: StepPlan, k: int | None) -> bool:
    return k is not None and 0 <= k < len(plan.usable) and plan.usable[k]


def _promoted(x: Tensor, m: Tensor) -> torch.dtype:
    return x.dtype if x.dtype is m.dtype else torch.promote_types(x.dtype, m.dtype)


class Draws:
    """How a scheduler of diffusers draws: with ``randn_tensor`` of its module, whatever that is at the time.

    Args:
        held: the globals of its method.

    ``known()``: whether it is diffusers' own function, as it was when this was made.
    """

    def __init__(self, held: dict[str, Any]):
        self.held, self.function = held, held.get("randn_tensor")
        self.own = fingerprint(self.function) in RANDN_TENSOR

    def known(self) -> bool:
        return self.own and self.held["randn_tensor"] is self.function

    def __call__(self, like: Tensor, generator: Any, dtype: torch.dtype) -> Tensor:
        """Noise shaped as ``like``, on its device."""
        device = like.device
        if not _is_compiling() and device.type == "cpu" and self.known():
            if type(generator) is not list:
                return torch_noise.randn(like.shape, generator=generator, device=device, dtype=dtype)
            if len(generator) == 1:
                return torch_noise.randn(like.shape, generator=generator[0], device=device, dtype=dtype)
            if len(generator) == len(like) > 0:
                shape = (1, *like.shape[1:])
                return torch.cat([torch_noise.randn(shape, generator=g, device=device, dtype=dtype) for g in generator])
        return self.held["randn_tensor"](like.shape, generator=generator, device=device, dtype=dtype)


def results(output: type, *names: str) -> Callable:
    """``output`` made from values in the order of ``names``, without what its constructor spends on finding its fields:
    the object is the same, which is tried once; where it is not, the constructor is called."""
    first, second = names if len(names) == 2 else (*names, None)

    def quick(value: Any, other: Any = None) -> Any:
        return _C.make_output(output, first, value, second, other)

    values = tuple(torch.zeros(1) for _ in names)
    try:
        made, expected = quick(*values), output(**dict(zip(names, values)))
        same = list(made) == list(expected) == list(names) and set(made.__dict__) == set(expected.__dict__)
        same = same and all(made[name] is getattr(made, name) is value for name, value in zip(names, values))
    except Exception:  # whatever it is, it is not made like that; or fastdiff._C is not there
        same = False
    return quick if same else lambda *values: output(**dict(zip(names, values)))


NO_ROW = "no finite coefficients for this step"


def ddpm(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made, draw = results(output, "prev_sample", "pred_original_sample"), Draws(original.__globals__)

    @wraps(original)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        plan = plan_of(maker, self)
        if plan.quick and not plan.learned and not _is_compiling():
            t = timestep if type(timestep) is int else number(timestep, 0)
            k = plan.at.get(t)
            if k is not None and type(t) is int and plan.usable[k] and (t == 0 or draw.known()):
                flags = X0 | ONE_DTYPE if t == 0 else X0 | ONE_DTYPE | DRAW
                done = plan.run(k, sample, model_output, plan.clip, (), generator if t else None, None, flags)
                if done is not None:
                    fused[name] += 1
                    return made(done[0], done[1]) if return_dict else done[:2]
        reason, m, variance = plan.reason, model_output, None
        if reason is None:
            if plan.learned and isinstance(m, Tensor) and isinstance(sample, Tensor) and m.ndim == sample.ndim > 1:
                if m.shape[1] == 2 * sample.shape[1]:
                    m, variance = torch.split(m, sample.shape[1], dim=1)
                else:
                    reason = "no variance was predicted"
            reason = reason or unfit(sample, m, plan=plan) or _promotes(plan, timestep, sample, m)
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
            z = draw(m, generator, m.dtype)
        previous, x0, _ = plan.rows(
            k, sample, m, clip=plan.clip, noise=z, log_variance=variance, threshold=threshold, dtype=dtype
        )
        if not return_dict:
            return previous, x0
        return made(previous, x0)

    return step


def ddim(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made, draw = results(output, "prev_sample", "pred_original_sample"), Draws(original.__globals__)

    @wraps(original)
    def step(
        self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None,
        variance_noise=None, return_dict=True,
    ):  # fmt: skip
        plan = plan_of(maker, self)
        if plan.quick and type(eta) is float and variance_noise is None and not _is_compiling():
            k = timestep if type(timestep) is int else number(timestep, 0)
            if type(k) is int and 0 <= k < plan.count and (eta <= 0 or draw.known()):
                rows, usable = plan.choose(eta, bool(use_clipped_model_output))
                done = None
                if usable[k]:
                    flags = X0 | ONE_DTYPE | DRAW if eta > 0 else X0 | ONE_DTYPE
                    done = rows.run(k, sample, model_output, plan.clip, (), generator if eta > 0 else None, None, flags)
                if done is not None:
                    fused[name] += 1
                    return made(done[0], done[1]) if return_dict else done[:2]
        reason = (
            plan.reason or unfit(sample, model_output, plan=plan) or _promotes(plan, timestep, sample, model_output)
        )
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
                z = draw(model_output, generator, model_output.dtype)
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
    made, draw = results(output, "prev_sample", "denoised"), Draws(original.__globals__)

    @wraps(original)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        plan = plan_of(maker, self)
        k = self._step_index
        if plan.quick and not plan.clips and k is not None and _usable(plan, k) and not _is_compiling():
            t, draws = timestep if type(timestep) is int else number(timestep, 0), plan.draws[k]
            if t == plan.times[k] and type(t) is int and (not draws or draw.known()):
                flags = X0 | ONE_DTYPE | DRAW if draws else X0 | ONE_DTYPE
                done = plan.run(k, sample, model_output, None, (), generator if draws else None, None, flags)
                if done is not None:
                    fused[name] += 1
                    self._step_index = k + 1
                    return made(done[0], done[1]) if return_dict else done[:2]
        reason = (
            plan.reason or unfit(sample, model_output, plan=plan) or _promotes(plan, timestep, sample, model_output)
        )
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
            z = draw(m, generator, dtype)
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
        k = _quick_index(self, plan, timestep)
        if k is not None and s_churn == 0 and self.is_scale_input_called:
            flags = MODEL_DTYPE if plan.given else MODEL_DTYPE | ENTRY
            done = plan.run(k, sample, model_output, None, (), None, None, flags)
            if done is not None:
                fused[name] += 1
                self._step_index = k + 1
                x0 = model_output if plan.given else done[2]
                return made(done[0], x0) if return_dict else (done[0], x0)
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
        k = _quick_index(self, plan, timestep)
        if k is not None and s_churn == 0 and pred_original_sample is None and self.is_scale_input_called:
            done = plan.run(k, sample, model_output, None, (), None, None, MODEL_DTYPE | ENTRY)
            if done is not None:
                fused[name] += 1
                self._step_index = k + 1
                return made(done[0], done[2]) if return_dict else (done[0], done[2])
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
    made, draw = results(output, "prev_sample", "pred_original_sample"), Draws(original.__globals__)

    @wraps(original)
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        plan, m = plan_of(maker, self), model_output
        k = _quick_index(self, plan, timestep)
        if k is not None and self.is_scale_input_called and draw.known():
            done = plan.run(k, sample, m, None, (), generator, None, MODEL_DTYPE | ENTRY | DRAW)
            if done is not None:
                fused[name] += 1
                self._step_index = k + 1
                return made(done[0], done[2]) if return_dict else (done[0], done[2])
        reason = None if self.is_scale_input_called else "scale_model_input was not called"
        if reason is None:
            k, reason = _sigma_step(self, plan, timestep, sample, m)
        if reason is not None:
            return left(name, reason, original, self, m, timestep, sample, generator, return_dict)
        count(name)
        z = draw(m, generator, m.dtype)
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


def _quick_call(scheduler: Any, plan: Any, x: Any, began: torch.dtype) -> tuple[int, bool]:
    """(row, whether it is a step's first call), for the quick way of Heun's method; a row of -1 is none."""
    k, first = scheduler._step_index, scheduler.dt is None
    if k is None or k >= plan.count or not plan.quick or _is_compiling():
        return -1, first
    if not first and _second(scheduler, plan, k, x, began) is not None:
        return -1, first
    row = k if first else k + plan.count
    return row if _usable(plan, row) else -1, first


def heun(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made = results(output, "prev_sample", "pred_original_sample")

    @wraps(original)
    def step(self, model_output, timestep, sample, return_dict=True):
        plan, first = plan_of(maker, self), True
        if plan.quick and type(sample) is Tensor:
            row, first = _quick_call(self, plan, sample, sample.dtype)
            past = () if first else (self.sample, self.prev_derivative)
            flags, done = X0 | ENTRY | ONE_DTYPE if first else X0 | ONE_DTYPE, None
            if row >= 0:
                done = plan.run(row, sample, model_output, plan.clip, past, None, None, flags)
            if done is not None:
                fused[name] += 1
                if first:
                    self.prev_derivative = done[2].to(sample.dtype)
                    self.dt, self.sample = plan.step(row), sample
                else:
                    self.prev_derivative = self.dt = self.sample = None
                self._step_index += 1
                return made(done[0], done[1]) if return_dict else done[:2]
        reason = plan.reason or unfit(sample, model_output, plan=plan)
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
        if "dt" not in self.__dict__:
            reason = "set_timesteps was not called"
            return left(
                name, reason, original, self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                generator, return_dict,
            )  # fmt: skip
        if plan.quick and s_churn == 0 and type(sample) is Tensor and not _whole(timestep):
            row, first = _quick_call(self, plan, sample, torch.float32)
            past = () if first else (self.sample, self.prev_derivative)
            flags, done = MODEL_DTYPE | ENTRY if first else MODEL_DTYPE, None
            if row >= 0:
                done = plan.run(row, sample, model_output, None, past, None, None, flags)
            if done is not None:
                fused[name] += 1
                if first:
                    self.prev_derivative, self.dt, self.sample = done[2], plan.step(row), sample.to(torch.float32)
                else:
                    self.prev_derivative = self.dt = self.sample = None
                self._step_index += 1
                return made(done[0]) if return_dict else done[:1]
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
    made, draw = results(output, "prev_sample"), Draws(original.__globals__)

    @wraps(original)
    def step(
        self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0,
        generator=None, per_token_timesteps=None, return_dict=True,
    ):  # fmt: skip
        plan = plan_of(maker, self)
        k = _quick_index(self, plan, timestep)
        if k is not None and per_token_timesteps is None and (not plan.draws or draw.known()):
            flags = MODEL_DTYPE | DRAW_FLOAT if plan.draws else MODEL_DTYPE
            done = plan.run(k, sample, model_output, None, (), generator if plan.draws else None, None, flags)
            if done is not None:
                fused[name] += 1
                self._step_index = k + 1
                return made(done[0]) if return_dict else done[:1]
        if per_token_timesteps is not None:
            k, reason = None, "per_token_timesteps"
        elif plan.reason is None and plan.draws and draw.function is None:
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
            z = draw(sample, generator, torch.float32)
        previous, _, _ = plan.rows(k, sample, model_output, noise=z, dtype=model_output.dtype, return_x0=False)
        self._step_index += 1
        if not return_dict:
            return (previous,)
        return made(previous)

    return step


def _past(outputs: list, count: int, x: Tensor) -> tuple[Tensor, ...] | None:
    """The latest ``count`` of the estimates kept, the latest first; None if they are not there or not as x, whose dtype
    may have changed between two steps."""
    if not count:
        return ()
    if count > len(outputs):
        return None
    past = tuple(outputs[: -count - 1 : -1])
    for entry in past:
        if not isinstance(entry, Tensor) or entry.shape != x.shape or entry.device != x.device:
            return None
        if entry.dtype is not x.dtype:
            return None
    return past


def _order(scheduler: Any, plan: Any, k: int) -> int:
    """Of step k of DPM-Solver."""
    if k == plan.first_order_at:
        return 1
    order = min(plan.order, scheduler.lower_order_nums + 1)
    return min(order, 2) if k == plan.second_order_at else order


def _keep(scheduler: Any, plan: Any, entry: Tensor) -> None:
    """Put ``entry`` behind the estimates that are kept, and go on to the next step."""
    outputs = scheduler.model_outputs
    for i in range(plan.order - 1):
        outputs[i] = outputs[i + 1]
    outputs[-1] = entry
    if scheduler.lower_order_nums < plan.order:
        scheduler.lower_order_nums += 1
    scheduler._step_index += 1


def dpm_solver(original: Callable, name: str, maker: Maker, output: type) -> Callable:
    made, draw = results(output, "prev_sample"), Draws(original.__globals__)

    @wraps(original)
    def step(self, model_output, timestep, sample, generator=None, variance_noise=None, return_dict=True):
        plan, m, k = plan_of(maker, self), model_output, self._step_index
        if plan.quick and k is not None and 0 <= k < plan.count and not _is_compiling():
            order, outputs, sde = _order(self, plan, k), self.model_outputs, plan.sde
            row, done = (order - 1) * plan.count + k, None
            draws = not sde or (variance_noise is None and draw.known())
            if plan.usable[row] and order <= len(outputs) and draws:
                past = () if order == 1 else (outputs[-1],) if order == 2 else (outputs[-1], outputs[-2])
                flags = X0 | ONE_DTYPE | DRAW_FLOAT if sde else X0 | ONE_DTYPE
                done = plan.run(row, sample, m, None, past, generator if sde else None, None, flags)
            if done is not None:
                fused[name] += 1
                _keep(self, plan, done[1])
                return made(done[0]) if return_dict else done[:1]
        reason = plan.reason or unfit(sample, m, NARROW, plan)
        if reason is None and sample.dtype is not m.dtype:
            reason = "sample and model output differ in dtype"
        if reason is None and self.num_inference_steps is None:
            reason = "set_timesteps was not called"
        if reason is None:
            k = _step_index(self, plan, timestep)
            order = _order(self, plan, k)
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
                z = draw(m, generator, torch.float32)
            else:
                z = variance_noise.to(device=m.device, dtype=torch.float32)
        previous, kept, _ = plan.rows(row, sample, m, history=past, noise=z, threshold=threshold)
        _keep(self, plan, kept)
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
        reason = plan.reason or unfit(sample, m, plan=plan)
        if reason is None and sample.ndim < 2:
            reason = "samples of one dimension"
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
        at, quick = correction if corrects else row, plan.quick and not _is_compiling()
        threshold = None if plan.quantile is None else plan.threshold(at, sample, m, m.dtype)
        entries = (last, *before) if corrects else past
        done = plan.run(at, sample, m, None, entries, None, None, X0 | ONE_DTYPE) if quick else None
        if done is None:
            done = plan.rows(at, sample, m, history=entries, threshold=threshold)
        previous, kept, _ = done
        if corrects:
            sample = previous
            done = plan.run(row, sample, kept, None, past, None, None, ONE_DTYPE) if quick else None
            previous, _, _ = done or plan.rows(row, sample, kept, history=past, return_x0=False)
        times = self.timestep_list
        for i in range(plan.order - 1):
            times[i] = times[i + 1]
        times[-1] = timestep
        self.this_order, self.last_sample = order, sample
        _keep(self, plan, kept)
        if not return_dict:
            return (previous,)
        return made(previous)

    return step
