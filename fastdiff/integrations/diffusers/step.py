"""The driver of the fused ``step``: arguments, checks, draws, results and errors of every diffusers scheduler.

What differs between schedulers is in their records, each a ``Stepper``. A call that a stepper or a check here declines
goes to diffusers' own method. Until then nothing is drawn, and nothing of the scheduler's state is changed but its step
index, which that method too would set first.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ... import torch_randn
from ...ops.step_table import DRAW, DRAW_FLOAT, ENTRY, MODEL_DTYPE, X0
from ...torch_access import _C, number
from .call_counts import count, fused, left
from .coefficient_cache import STEPS, Cache, is_current
from .source_digests import RANDN_TENSOR, fingerprint
from .stepper import FLOATS, HALVES, Options, Passes, Stepper

_is_compiling = torch.compiler.is_compiling


def fused_step(original: Callable, name: str, cache: Cache) -> Callable:
    """The fused method for ``original``, the method ``step`` of a diffusers scheduler.

    Args:
        name: under which its calls are counted, such as "DDPMScheduler.step".
        cache: gives a scheduler's ``Stepper``.
    """
    module = original.__globals__
    # diffusers names the class of a step's result after the scheduler, or after another one, or SchedulerOutput.
    outputs = [key for key in module if key.endswith("SchedulerOutput")]
    output = module.get(f"{name.partition('.')[0]}Output") or module[outputs[0]]
    fields = [field.name for field in dataclasses.fields(output)]
    made, draw = results(output, *fields), Draws(module)
    optional = tuple(inspect.signature(original).parameters)[4:]  # after self, model_output, timestep and sample

    @wraps(original)
    def step(self, model_output, timestep, sample, *more, **options):
        if more:
            named = dict(zip(optional, more))
            if len(more) > len(optional) or named.keys() & options.keys():
                return original(self, model_output, timestep, sample, *more, **options)  # raises TypeError
            options = named | options
        for option in options:
            if option not in optional:
                return original(self, model_output, timestep, sample, **options)  # raises TypeError

        compiling = _is_compiling()
        if compiling:
            stepper = cache.traced(self)
        else:  # what cache(self) does, without a call
            held = self.__dict__
            stepper = held.get(STEPS)
            if stepper is None or not cache.enabled or not is_current(stepper.watched, held):
                stepper = cache(self)

        reason, done, x, m = stepper.reason, None, sample, model_output
        if reason is None:
            fast, t = stepper.fast and not compiling, timestep
            if stepper.by_timestep and type(t) is not int:
                t = None if compiling else number(timestep, 0)
                if type(t) is not int:
                    fast, t = False, (stepper.integer_untraced if compiling else stepper.integer)(timestep)
            passes = stepper.locate(self, sample, model_output, timestep, t, options)
            if fast and type(passes) is tuple:
                for k, history, noise, flags in passes:
                    if done is not None:
                        x, m = done[0], done[1]
                    if flags & DRAW:
                        if not draw.known():
                            done = None
                            break
                        noise = options.get("generator")
                    # The fast call reads the tensors and draws the noise in C. If it declines, nothing was drawn.
                    done = stepper.table.run(k, x, m, stepper.clip, history, noise, None, flags)
                    if done is None:
                        break
            if done is None:
                reason, x, m, done = _run(stepper, passes, sample, model_output, timestep, options, draw)
        if reason is not None:
            return left(name, reason, original, self, model_output, timestep, sample, **options)

        if compiling:
            count(name)
        else:
            fused[name] += 1
        other = stepper.finish(self, timestep, x, m, done)
        if options.get("return_dict", True):
            return made(done[0], other)
        return (done[0], other) if len(fields) == 2 else (done[0],)

    return step


def _run(
    stepper: Stepper, passes: Passes | str, x: Any, m: Any, timestep: Any, options: Options, draw: Draws
) -> tuple[str | None, Any, Any, Any]:
    """The passes by the operation that every device has, after all checks.

    Returns (None, x, m, done), the last three as ``Stepper.finish`` takes them; or (why diffusers has to do this call,
    x, m, None), and then nothing was drawn.
    """
    variance = None
    if stepper.learned and isinstance(m, Tensor) and isinstance(x, Tensor) and m.ndim == x.ndim > 1:
        if m.shape[1] == 2 * x.shape[1]:
            m, variance = torch.split(m, x.shape[1], dim=1)
    reason = _declined(stepper, passes, x, m, variance, timestep, draw)
    if reason is not None:
        return reason, x, m, None
    dtype = m.dtype if passes[0][3] & MODEL_DTYPE else torch.promote_types(x.dtype, m.dtype)
    threshold = None if stepper.quantile is None else stepper.threshold(passes[0][0], x, m, dtype)
    done = None
    for k, history, noise, flags in passes:
        if done is not None:
            x, m, threshold = done[0], done[1], None
        if flags & DRAW:
            drawn = dtype if stepper.noise_as_result else m.dtype
            noise = draw(m, options.get("generator"), torch.float32 if flags & DRAW_FLOAT == DRAW_FLOAT else drawn)
        done = stepper.table(
            k, x, m, clip=stepper.clip, history=history, noise=noise, log_variance=variance, threshold=threshold,
            dtype=dtype, return_x0=bool(flags & X0), return_entry=bool(flags & ENTRY),
        )  # fmt: skip
    return None, x, m, done


def unfit(x: Any, m: Any, dtypes: frozenset[torch.dtype] = FLOATS) -> str | None:
    """Why no operation takes these as sample and model output, both [batch, ...]; None if one does."""
    if not (isinstance(x, Tensor) and isinstance(m, Tensor)):
        return "sample or model output is no tensor"
    if x.shape != m.shape:
        return "sample and model output differ in shape"
    if x.device != m.device:
        return "sample and model output are on different devices"
    if x.dtype not in dtypes or m.dtype not in dtypes:
        return f"sample or model output of dtype {x.dtype if x.dtype not in dtypes else m.dtype}"
    return None


def _declined(
    stepper: Stepper, passes: Passes | str, x: Any, m: Any, variance: Tensor | None, timestep: Any, draw: Draws
) -> str | None:
    """Why diffusers has to do this call; None if it has not."""
    reason = unfit(x, m, stepper.dtypes)
    if reason is not None:
        return reason
    if stepper.learned and variance is None:
        return "no variance was predicted"
    if stepper.quantile is not None and x.ndim < 3:
        return "thresholding of samples without height and width"
    if stepper.one_dtype and x.dtype is not m.dtype:
        return "sample and model output differ in dtype"
    if stepper.by_timestep and isinstance(timestep, Tensor) and timestep.ndim:
        # diffusers' coefficients then have a dimension, and promote half precision to float32.
        if torch.promote_types(x.dtype, m.dtype) in HALVES:
            return "a timestep of shape [1] with samples in half precision"
    if type(passes) is str:
        return passes
    for _, history, _, flags in passes:
        for entry in history:
            if not isinstance(entry, Tensor) or entry.shape != m.shape or entry.device != m.device:
                return "the history differs from the sample in shape or device"
        if flags & DRAW and draw.function is None:
            return "this version of diffusers draws its noise otherwise"
    return None


class Draws:
    """Draws noise as a scheduler of diffusers does: with the function ``randn_tensor`` of the scheduler's module, also
    where somebody has put another function there.

    Args:
        held: the globals of the scheduler's ``step``.
    """

    def __init__(self, held: dict[str, Any]):
        self.held, self.function = held, held.get("randn_tensor")
        self.own = fingerprint(self.function) in RANDN_TENSOR

    def known(self) -> bool:
        """Whether diffusers' own function is there, whose numbers fastdiff can draw itself."""
        return self.own and self.held["randn_tensor"] is self.function

    def __call__(self, like: Tensor, generator: Any, dtype: torch.dtype) -> Tensor:
        """Noise shaped as ``like``, on its device."""
        device = like.device
        if not _is_compiling() and device.type == "cpu" and self.known():
            if type(generator) is not list:
                return torch_randn.randn(like.shape, generator=generator, device=device, dtype=dtype)
            if len(generator) == 1:
                return torch_randn.randn(like.shape, generator=generator[0], device=device, dtype=dtype)
            if len(generator) == len(like) > 0:
                shape = (1, *like.shape[1:])
                return torch.cat([torch_randn.randn(shape, generator=g, device=device, dtype=dtype) for g in generator])
        return self.held["randn_tensor"](like.shape, generator=generator, device=device, dtype=dtype)


def results(output: type, *names: str) -> Callable:
    """A function that makes ``output``, a class of results of diffusers, from one or two values in the order of
    ``names``. It spares what the constructor spends on finding its fields. That it makes the same object is tried once
    here; where it does not, the constructor is called."""
    first, second = names if len(names) == 2 else (*names, None)

    def fast(value: Any, other: Any = None) -> Any:
        return _C.make_output(output, first, value, second, other)

    values = tuple(torch.zeros(1) for _ in names)
    try:
        made, expected = fast(*values), output(**dict(zip(names, values)))
        same = list(made) == list(expected) == list(names) and set(made.__dict__) == set(expected.__dict__)
        same = same and all(made[name] is getattr(made, name) is value for name, value in zip(names, values))
    except Exception:  # whatever it is, it is not made like that; or fastdiff._C is not there
        same = False
    return fast if same else lambda *values: output(**dict(zip(names, values)))
