"""The sampling loop."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops, samplers, torch_randn
from .. import prediction as kinds
from ..names import answers_keywords
from ..ops.checks import check_tensor
from ..philox import Stream, draw_seed, whole
from ..prediction import Prediction
from ..process import Process, check_process
from ..showing import brief
from .cuda_graph import Graphed, check_capture
from .guidance import Guidance

# What other libraries call the arguments of ``sample``.
_OTHER_NAMES = {
    "network": "model=",
    "unet": "model=",
    "size": "shape=",
    "batch_size": "shape=, which begins with it",
    "objective": "process=, which takes an Objective too",
    "scheduler": "sampler=",
    "num_inference_steps": "steps=",
    "num_steps": "steps=",
    "prediction_type": "prediction=",
    "condition": "cond=",
    "conditioning": "cond=",
    "labels": "cond=",
    "class_labels": "cond=",
    "y": "cond=",
    "context": "cond=",
    "encoder_hidden_states": "cond=",
    "prompt_embeds": "cond=",
    "negative_prompt_embeds": "uncond=",
    "guidance_scale": "guidance=",
    "cfg_scale": "guidance=",
    "latents": "x=",
    "image": "cond=, or known= and mask= for inpainting",
    "timesteps": "steps=, or sampler=fastdiff.samplers.DDIM(timesteps=...)",
    "sigmas": "sampler=fastdiff.samplers.DPMSolverPP(sigmas=...)",
    "eta": "sampler=fastdiff.samplers.DDIM(eta=...)",
    "clip": "sampler=fastdiff.samplers.DDIM(clip=...)",
    "clip_denoised": "sampler=fastdiff.samplers.DDIM(clip=1.0)",
}


class TrainedOn(Protocol):
    """What a network was trained on, as an ``Objective`` has it."""

    process: Process
    prediction: Prediction


@answers_keywords(_OTHER_NAMES)
@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    shape: tuple[int, ...],
    process: Process | TrainedOn,
    sampler: str | samplers.Sampler = "ddpm",
    steps: int | None = None,
    prediction: str | Prediction | None = None,
    *,
    cond: Any = None,
    uncond: Any = None,
    guidance: float | Tensor = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float = 0.0,
    dynamic_thresholding: float | None = None,
    sample_max_value: float | None = None,
    cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise: Callable[[int, tuple[int, ...]], Tensor] | None = None,
    x: Tensor | None = None,
    sample_offset: int = 0,
    step_offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    callback: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    return_trajectory: bool = False,
    compile: bool = False,
    cuda_graph: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw samples from a trained network.

    Args:
        model: called as ``model(x, t)``, or ``model(x, t, cond)`` with a condition; t is [batch], the ``model_time`` of
            training. It is used as it is: call ``.eval()`` first if it has dropout. The x that it is given may be
            written over by the next step, unless there is a callback or ``return_trajectory``: a model that keeps it,
            or a view of it, should clone it. (On the CPU a tensor that is kept is left alone; a view is not known of.)
        shape: [batch, ...] of the samples.
        process, prediction: those of training; or the ``Objective`` of training in place of the process, which has
            both (``objective.sample(model, shape, ...)`` is the same).
        sampler: a name of ``fastdiff.samplers.NAMES``, or an object of ``fastdiff.samplers``.
        steps: the number of steps; None: all of a discrete process, 50 for others.
        cond: a tensor [batch, ...], or a tuple, list or dict of such, given to the model.
        uncond: the same for classifier-free guidance (Ho and Salimans 2022); then the model sees a batch of twice the
            size, the unconditional half first. A tensor [1, ...] or [] of either goes with every sample.
        guidance: m_uncond + guidance (m_cond - m_uncond), a number or one a sample. 1 is no guidance; other values need
            ``uncond``.
        guidance_interval: (low, high): guidance only where low <= t <= high, in the process's own t (Kynkaanniemi et
            al. 2024); elsewhere the unconditional half is not computed.
        guidance_rescale: phi of Lin et al. 2024, section 3.4: how much of the deviation that guidance adds to each
            sample of the network's output is taken away again. 0 to 1.
        dynamic_thresholding: quantile of abs(x0) that each sample's x0 estimate is clamped to, and divided by, where it
            exceeds 1 (Saharia et al. 2022; 0.995 there). Not with a sampler that has a ``clip``.
        sample_max_value: no more than this is divided by.
        cond_fn: classifier guidance (Dhariwal and Nichol 2021): ``cond_fn(x, t)`` returns the gradient of
            log p(y | x_t), scaled as wished, t as the model's. It changes the posterior mean of DDPM (their algorithm
            1) and the noise estimate of the others (algorithm 2). Gradients are enabled in it.
        known, mask: inpainting: where the mask is 1 (or True; it is broadcast), the samples are ``known``, noised to
            the level of each step with one noise (the initial one) for all steps.
        seed, generator: what the noise is made from, by sample index; without either, PyTorch's default generator. A
            list of generators, one a sample, is drawn from with torch.randn: x first, then step by step. Samples do not
            depend on the batch they are in, with a seed or with a list.
        noise: ``noise(step, shape)`` gives the noise of a step instead.
        x: where to start; None: noise from the seed.
        sample_offset: the index of the first sample. With one seed, 8 samples are 4 and another 4 with offset 4.
        step_offset: the index of the first step. The noise of a step is made from the seed and this index: a run that
            goes on from another's x, with the same seed, has to be given the number of steps that were made, or it adds
            the noise that was added before.
        device: None: that of x, or of the model's parameters.
        dtype: of the samples and of what the model sees.
        progress: show a bar, if tqdm is installed.
        callback: ``callback(step, t, x, x0)`` after every step: the step's t, the new x and the x0 estimate. It may
            write into x: the run goes on from what is there then (history that a multistep method keeps stays as it
            is). What it writes into x0 changes nothing.
        return_trajectory: return (samples, x at the start and after every step ``[steps + 1, *shape]``).
        compile: run the model through ``torch.compile``.
        cuda_graph: capture model and step in a CUDA graph once and replay it at every step: for a model that can be
            captured, on a CUDA device, without what looks at each step's output (``guidance_rescale``,
            ``dynamic_thresholding``, ``cond_fn``, a learned variance) and without a ``guidance_interval``.

    Returns the samples, of ``shape`` and ``dtype``. Raises ValueError or TypeError for unfit inputs, before the first
    call of the model.
    """
    shape = _checked(model, shape)
    process, prediction = _trained_on(process, prediction)
    sampler = samplers.get(sampler)
    steps = None if steps is None else whole("steps", steps)
    sample_offset, step_offset = whole("sample_offset", sample_offset), whole("step_offset", step_offset)
    if step_offset < 0:
        raise ValueError(f"step_offset must be at least 0; got {step_offset}.")
    for name, tensor in (("x", x), ("mask", mask), ("known", known)):
        if tensor is not None:
            check_tensor(name, tensor, name)
    if noise is not None and not callable(noise):
        raise TypeError(
            f"noise must be a function (step, shape) -> tensor; got {brief(noise)}. A start is passed as x=."
        )
    plan = _planned(sampler, process, steps, prediction)
    if uncond is not None and cond is None:
        raise ValueError("uncond was given without cond: guidance needs the condition of both halves.")
    if isinstance(guidance, (int, float)) and guidance == 1.0:
        uncond = None
    elif uncond is None:
        raise ValueError(f"guidance={guidance} needs uncond: the condition of the unconditional half.")
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, but shape is {shape}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, such as torch.float32; got {dtype!r}.")
    device = _device(model, x, device)
    source = _Noise(
        plan, shape, device, dtype, seed, generator, noise, sample_offset, step_offset, x is None, mask is not None
    )
    how = Guidance(
        plan, sampler, guidance, uncond is not None, guidance_interval, guidance_rescale, dynamic_thresholding,
        sample_max_value, cond_fn,
    )  # fmt: skip

    if cuda_graph:
        check_capture(device, plan, how)
    z = source.initial if x is None or mask is not None else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if x is None:
        assert z is not None
        x = plan.initial_std * (z if isinstance(z, Tensor) else ops.materialize(z, shape, device)).to(wide)
    x = x.to(device, dtype)
    if plan.start is not None:
        factor, strength = plan.start
        x = factor * x.to(wide)
        if strength:
            x = x + strength * source.churn().to(wide)
        x = x.to(dtype)
    step_options = {
        "guidance": guidance,
        "clip": plan.clip,
        "mask": None if mask is None else mask.to(device),
        "known": None if known is None else known.to(device, dtype),
        "known_noise": None if mask is None else z,
    }
    network = torch.compile(model) if compile else model
    told = _told(plan, device, dtype)
    cond, both = _conditions(cond, uncond, shape[0])
    scale = 1.0 if plan.model_scale is None else float(plan.model_scale[0])
    visited = plan.times.to(device) if callback is not None else plan.times
    index = range(len(plan.times)) if plan.steps is None else plan.steps
    path = [x] if return_trajectory else []
    last, began = len(told) - 1, 0
    graphed = None
    if cuda_graph:
        try:
            graphed = run = Graphed(
                network, x, how.rows, told, both, how.guided[0], scale, plan.draws, source.streams, source.philox,
                callback is not None, **step_options,
            )  # fmt: skip
        except TypeError as error:
            _explain(error, model, cond)
            raise
        times: list[Tensor] = []
    else:
        times = _model_times(told, how.guided, len(x))
        reuse = callback is None and not return_trajectory
        run = ops.trajectory(x, how.rows, philox=source.philox, reuse=reuse, **step_options)
        run.begin(scale, 1 + how.guided[0])
    copies = [*(1 + both for both in how.guided[1:]), 0]
    streams = source.streams
    simple = graphed is None and how.plain and not plan.learned_variance and callback is None and not return_trajectory
    for k in _bar(range(len(told)), progress):
        z = source.step(k) if streams is None else streams[k]
        guided = how.guided[k]
        if graphed is None:
            try:
                if cond is None:
                    m = network(run.seen, times[k])
                else:
                    m = network(run.seen, times[k], both if guided else cond)
            except TypeError as error:
                _explain(error, model, cond)
                raise
            check_tensor("the model's output", m, "output")
        if simple:
            run.step(k, m, guided, z, copies[k])
            continue
        ends = k == last or index[k + 1] != index[k]
        if graphed is not None:
            graphed.step(z)
        else:
            variance = None
            if plan.learned_variance:
                m, variance = _variance(m, shape, guided)
            elif not how.plain and m.shape != run.seen.shape:
                raise ValueError(f"the model returned shape {tuple(m.shape)} for an input of {tuple(run.seen.shape)}.")
            wanted = callback is not None and ends
            extras: dict[str, Any] = {}
            if not how.plain:
                m, extras = how.prepare(k, run, m, guided, variance, times[k])
            run.step(k, m, guided, z, copies[k], wanted, variance, **extras)
        if not ends:
            continue
        if return_trajectory:
            path.append(run.x if graphed is None else run.x.clone())
        if callback is not None:
            now = (run.x, run.x0) if graphed is None else (run.x.clone(), run.x0.clone())
            callback(index[k], visited[began], *now)
            if graphed is not None:
                graphed.put(k, now[0])
            elif k != last and run.seen is not run.x:
                run.begin(run.scales[k], copies[k])
        began = k + 1
    return (run.x, torch.stack(path)) if return_trajectory else run.x


def _checked(model: Any, shape: Any) -> tuple[int, ...]:
    """``shape`` as a tuple. Raises TypeError where one of the two is something else, or they are swapped."""
    if callable(shape):
        raise TypeError("the arguments are swapped: the network comes first, then the shape of the samples.")
    if not callable(model):
        raise TypeError(f"model must be the network, called as model(x, t); got {brief(model)}.")
    try:
        return tuple(whole("shape", n) for n in shape)
    except TypeError:
        raise TypeError(
            f"shape must be [batch, ...] of the samples, such as (16, 4, 64, 64); got {brief(shape)}."
        ) from None


def _explain(error: TypeError, model: Any, cond: Any) -> None:
    """Raise another error for one of calling ``model``, where its signature shows that the condition is why."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # it has none
        return

    def takes(*arguments: str) -> bool:
        try:
            signature.bind(*arguments)
        except TypeError:
            return False
        return True

    if takes("x", "t", "cond") == takes("x", "t") or takes("x", "t") == (cond is None):
        return
    if cond is None:
        name = [*signature.parameters][2]
        raise TypeError(
            f"the network takes a condition, {name!r}, but none was given: pass it as sample(..., cond=...)."
        ) from error
    raise TypeError(
        f"the network takes no condition, its arguments are {signature}, but cond was given: leave it out, or give "
        f"the network a third argument."
    ) from error


def _trained_on(process: Process | TrainedOn, prediction: str | Prediction | None) -> tuple[Process, Prediction]:
    """The process and the prediction kind of a network. Raises TypeError or ValueError where they are not known."""
    if isinstance(getattr(process, "process", None), Process):  # an Objective
        own = process.prediction
        if prediction is not None and kinds.get(prediction) is not own:
            raise ValueError(
                f"the objective predicts {own.name!r}, but prediction is {kinds.get(prediction).name!r}: leave it out."
            )
        return process.process, own
    check_process(process)
    if prediction is None:
        raise TypeError(
            "prediction is missing: samples depend on what the network was trained to predict. Write "
            "objective.sample(model, shape, ...), or give its kind, such as prediction='epsilon' or 'v_prediction'."
        )
    return process, kinds.get(prediction)


_plans: weakref.WeakKeyDictionary[Process, dict[Any, samplers.Plan]] = weakref.WeakKeyDictionary()


def _planned(sampler: samplers.Sampler, process: Process, steps: int | None, prediction: Prediction) -> samplers.Plan:
    """The sampler's plan; the last few of each process are kept, for in a short run making it is most of the time. Not
    of a sampler with a field that may change under it, such as a tensor."""
    if not (
        dataclasses.is_dataclass(sampler)
        and sampler.__dataclass_params__.frozen
        and all(_never_changes(getattr(sampler, field.name)) for field in dataclasses.fields(sampler))
    ):
        return sampler.plan(process, steps, prediction)
    # The process's numbers too: it is not frozen.
    numbers = tuple(value for value in vars(process).values() if isinstance(value, (int, float, str)))
    key = (sampler, steps, prediction, numbers)
    try:
        kept = _plans.setdefault(process, {})
        found = kept.get(key)
    except TypeError:  # made with a list
        return sampler.plan(process, steps, prediction)
    if found is None:
        if len(kept) >= 16:
            kept.clear()
        found = kept[key] = sampler.plan(process, steps, prediction)
    return found


def _never_changes(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_never_changes, value))
    return value is None or isinstance(value, (bool, int, float, str, range, Prediction))


class _Noise:
    """Where a run's noise comes from. Checks the arguments that say so."""

    def __init__(self, plan, shape, device, dtype, seed, generator, noise, sample_offset, first, starts, inpaints):
        if seed is not None and generator is not None:
            raise ValueError("pass a seed or a generator, not both.")
        self._shape, self._device, self._dtype, self._noise, self._draws = shape, device, dtype, noise, plan.draws
        # Churn is drawn for the step that comes next.
        self._first, later = first, first if plan.start is None else first + 1
        self._steps = [k + later for k in (range(len(plan.times)) if plan.steps is None else plan.steps)]
        self._generators = None
        if hasattr(generator, "__iter__"):
            self._generators = list(generator)
            if len(self._generators) != shape[0]:
                raise ValueError(f"{len(self._generators)} generators for {shape[0]} samples: one each is needed.")
        draws = any(plan.draws) or (plan.start is not None and plan.start[1] > 0)
        self.philox: ops.Philox | None = None
        if self._generators is not None:
            self.initial = self._drawn() if starts or inpaints else None
        elif starts or inpaints or (draws and noise is None):
            if seed is None:
                seed = draw_seed(generator, device)
            if isinstance(seed, Tensor) and seed.device.type == "cpu":
                seed = int(seed)
            self.initial = self.philox = ops.Philox(seed, sample_offset, Stream.INITIAL)
        else:
            self.initial = None
        # The streams of ``philox`` that the rows add, None for rows that add none; None where tensors are added.
        self.streams: list[int | None] | None = None
        if not draws or (noise is None and self._generators is None):
            self.streams = [Stream.STEP + k if drawn else None for k, drawn in zip(self._steps, plan.draws)]

    def step(self, k: int) -> Tensor | None:
        """The noise that row k adds, where there are no ``streams``."""
        if not self._draws[k]:
            return None
        if self._noise is not None:
            return self._noise(self._steps[k], self._shape).to(self._device)
        return self._drawn()

    def churn(self) -> Tensor:
        """The noise of the plan's start."""
        if self._noise is not None:
            return self._noise(self._first, self._shape).to(self._device)
        if self._generators is not None:
            return self._drawn()
        first = dataclasses.replace(self.philox, stream=Stream.STEP + self._first)
        return ops.materialize(first, self._shape, self._device)

    def _drawn(self) -> Tensor:
        assert self._generators is not None
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        drawn = [torch_randn.randn(self._shape[1:], generator=g, dtype=wide, device=g.device) for g in self._generators]
        none = torch.empty(self._shape, dtype=wide, device=self._device)
        return torch.stack([z.to(self._device) for z in drawn]) if drawn else none


def _told(plan: samplers.Plan, device: Any, dtype: Any) -> Tensor:
    """What the network is told at each row, [S]. A copy: a network may change the t that it is given."""
    told = plan.model_time.to(device, copy=True)
    if told.is_floating_point():
        told = told.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return told


def _model_times(told: Tensor, guided: Sequence[bool], batch: int) -> list[Tensor]:
    """The same for a batch: [batch], or [2 batch] where it is guided."""
    halves = told[:, None].expand(-1, batch).unbind(0)
    if not any(guided):
        return list(halves)
    wholes = told[:, None].expand(-1, 2 * batch).unbind(0)
    return [wholes[k] if both else halves[k] for k, both in enumerate(guided)]


def _variance(m: Tensor, shape: tuple[int, ...], guided: bool) -> tuple[Tensor, Tensor]:
    """(prediction, variance of the conditional half) of a network that returns both."""
    if m.ndim < 2 or m.shape[1] != 2 * shape[1]:
        raise ValueError(
            f"a learned variance needs a network that returns {2 * shape[1]} channels, prediction and variance; "
            f"got shape {tuple(m.shape)}."
        )
    m, variance = m.chunk(2, dim=1)
    return m.contiguous(), variance[-shape[0] :].contiguous()


def _conditions(cond: Any, uncond: Any, batch: int) -> tuple[Any, Any]:
    """What the network is given: (the condition, both halves, the unconditional first; without ``uncond`` the condition
    again). Raises ValueError for another batch size, TypeError for a text."""
    for name, half in (("cond", cond), ("uncond", uncond)):
        if isinstance(half, str):
            raise TypeError(
                f"{name} must be a tensor, or a tuple, list or dict of tensors; got str {brief(half)}: encode it first."
            )
    both = None if uncond is None else _both(uncond, cond, batch, "")
    if isinstance(cond, Tensor):
        cond = _of_all("cond", cond, batch)
    return cond, cond if both is None else both


def _both(uncond: Any, cond: Any, batch: int, at: str) -> Any:
    """``at``: where in the condition, for messages. A tensor [1, ...] goes with all samples."""
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        return torch.cat([_of_all("uncond" + at, uncond, batch), _of_all("cond" + at, cond, batch)])
    for kind in (dict, tuple, list):
        if isinstance(cond, kind) and isinstance(uncond, kind):
            keys, others = ([*c] if kind is dict else [*range(len(c))] for c in (cond, uncond))
            if set(keys) != set(others):
                raise ValueError(f"cond{at} and uncond{at} must have the same entries; got {keys} and {others}.")
            if kind is dict:
                return {key: _both(uncond[key], value, batch, f"{at}[{key!r}]") for key, value in cond.items()}
            return type(cond)(_both(uncond[k], value, batch, f"{at}[{k}]") for k, value in enumerate(cond))
    if type(cond) is type(uncond):
        raise TypeError(f"cond{at} must be a tensor, or a tuple, list or dict of tensors; got {type(cond).__name__}.")
    raise TypeError(
        f"cond{at} and uncond{at} must be of one form; got {type(cond).__name__} and {type(uncond).__name__}."
    )


def _of_all(name: str, cond: Tensor, batch: int) -> Tensor:
    """[batch, ...]: a tensor [1, ...], or a single number, goes with every sample."""
    if cond.ndim and len(cond) == batch:
        return cond
    if cond.ndim and len(cond) != 1:
        raise ValueError(
            f"{name} has shape {tuple(cond.shape)}, but {batch} samples are drawn: its first dimension must be "
            f"{batch}, or 1 for all."
        )
    return cond.expand(batch, *cond.shape[1:]).contiguous()


def _device(model: Any, x: Tensor | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if x is not None:
        return x.device
    if isinstance(model, torch.nn.Module):
        parameter = next(model.parameters(), None)
        if parameter is not None:
            return parameter.device
    return torch.device("cpu")


def _bar(steps: range, progress: bool) -> Any:
    if not progress:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, desc="sampling", leave=False)
