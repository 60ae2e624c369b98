"""``fastdiff.sample``: a run is checked, prepared, and made step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, samplers
from ..guidance import Rule
from ..names import answers_keywords
from ..ops.checks import check_floating, check_tensor
from ..prediction import Prediction
from ..process import Process
from ..samplers import Plan
from .checking import check, explain_call
from .conditions import conditions
from .cuda_graph import Graphed
from .guidance import Guidance
from .noise_source import NoiseSource
from .request import Request, TrainedOn
from .watching import Watcher

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
    guidance: float | Tensor | Rule = 1.0,
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
    sample_offset: int | None = None,
    ids: Tensor | None = None,
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
        guidance: m_uncond + guidance (m_cond - m_uncond), a number or one a sample; or a rule of ``fastdiff.guidance``,
            such as ``CFGZero(4.0)``. The number 1 is no guidance; all else needs ``uncond``.
        guidance_interval: (low, high): guidance only where low <= t <= high, in the process's own t (Kynkaanniemi et
            al. 2024); elsewhere the unconditional half is not computed.
        guidance_rescale: phi of Lin et al. 2024, section 3.4: how much of the deviation that guidance, by a number or a
            rule, adds to each sample of the network's output is taken away again. 0 to 1.
        dynamic_thresholding: quantile of abs(x0) that each sample's x0 estimate is clamped to, and divided by, where it
            exceeds 1 (Saharia et al. 2022; 0.995 there). Not with a sampler that has a ``clip``.
        sample_max_value: no more than this is divided by.
        cond_fn: classifier guidance (Dhariwal and Nichol 2021): ``cond_fn(x, t)`` returns the gradient of
            log p(y | x_t), scaled as wished, t as the model's; ``fastdiff.guidance.classifier_gradient`` makes one. It
            changes the posterior mean of DDPM (their algorithm 1) and the noise estimate of the others (algorithm 2).
            Gradients are enabled in it, also under ``torch.inference_mode``.
        known, mask: inpainting: where the mask is 1 (or True; it is broadcast), the samples are ``known``, noised to
            the level of each step with one noise (the initial one) for all steps. ``known`` is floating point.
        seed, generator: what the noise is made from, by sample index; without either, PyTorch's default generator. A
            list of generators, one a sample, is drawn from with torch.randn: x first, then step by step. Samples do not
            depend on the batch they are in, with a seed or with a list.
        noise: ``noise(step, shape)`` gives the noise of a step instead.
        x: where to start, floating point; None: noise from the seed.
        sample_offset: the index of the first sample; None: 0. With one seed, 8 samples are 4 and another 4 with offset
            4. Several processes that give neither a seed nor ``ids`` draw different samples, see
            ``fastdiff.distributed.data_parallel``.
        ids: in its place a number for each sample, integers [batch]: samples of one id get the same noise, such as the
            pairs of a comparison. Not with ``noise`` or a list of generators, which say that themselves.
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
            captured, on a CUDA device, without what looks at each step's output (a rule of guidance,
            ``guidance_rescale``, ``dynamic_thresholding``, ``cond_fn``, a learned variance) and without a
            ``guidance_interval``.

    Returns the samples, of ``shape`` and ``dtype``. Raises ValueError or TypeError for unfit inputs, before the first
    call of the model.
    """
    request, plan, guidance = check(
        Request(
            model, shape, process, sampler, steps, prediction, cond, uncond, guidance, guidance_interval,
            guidance_rescale, dynamic_thresholding, sample_max_value, cond_fn, known, mask, seed, generator, noise, x,
            sample_offset, ids, step_offset, device, dtype, progress, callback, return_trajectory, compile, cuda_graph,
        )
    )  # fmt: skip
    return _run(request, plan, guidance, _prepare(request, plan, guidance))


class _Prepared(NamedTuple):
    """What stays the same from step to step.

    Attributes:
        network: the model, compiled if that is asked.
        cond, both: what it is given beside x and t: the condition, and where it is guided, that of both halves.
        times: what it is given as t in each row, [batch] or [2 batch]; with a CUDA graph, which has them, none.
        source: where the noise comes from.
        steps: takes the steps, and has x: a run of ``ops.trajectory``, or a ``Graphed``, which calls the network too.
    """

    network: Callable[..., Tensor]
    cond: Any
    both: Any
    times: list[Tensor]
    source: NoiseSource
    steps: Any


def _prepare(request: Request, plan: Plan, guidance: Guidance) -> _Prepared:
    """All that a run needs before its first step."""
    device, dtype, mask, known = request.device, request.dtype, request.mask, request.known
    cond, both = None, None
    if request.cond is not None:
        cond, both = conditions(request.cond, request.uncond, request.shape[0])
    network = torch.compile(request.model) if request.compile else request.model
    source = NoiseSource(request, plan)
    x = _start(request, plan, source)
    model_time = _model_time(plan, device, dtype)
    scale = 1.0 if plan.model_scale is None else float(plan.model_scale[0])
    options = {
        "guidance": request.guidance.scale if isinstance(request.guidance, Rule) else request.guidance,
        "clip": plan.clip,
        "mask": None if mask is None else mask.to(device),
        "known": None if known is None else known.to(device, dtype),
        "known_noise": None if mask is None else source.initial,
    }
    times: list[Tensor] = []
    if request.cuda_graph:
        try:
            steps = Graphed(
                network, x, guidance.rows, model_time, both, guidance.guided[0], scale, plan.draws, source.streams,
                source.philox, request.callback is not None, **options,
            )  # fmt: skip
        except TypeError as error:
            explain_call(error, request.model, cond)
            raise
    else:
        times = _of_batches(model_time, guidance.guided, len(x))
        reuse = request.callback is None and not request.return_trajectory
        steps = ops.trajectory(x, guidance.rows, philox=source.philox, reuse=reuse, **options)
        steps.begin(scale, 1 + guidance.guided[0])
    return _Prepared(network, cond, both, times, source, steps)


def _run(request: Request, plan: Plan, guidance: Guidance, prepared: _Prepared) -> Tensor | tuple[Tensor, Tensor]:
    """All steps: the network is called, its output goes into the step, and who looks on is shown what comes of it."""
    network, cond, both, times, source, steps = prepared
    graph, guided, streams = request.cuda_graph, guidance.guided, source.streams
    copies = [*[1 + halves for halves in guided[1:]], 0]  # how often the network sees x after each row
    watched = request.callback is not None or request.return_trajectory
    watcher = Watcher(request, plan, steps) if watched else None
    simple = not (watched or guidance.looks or plan.learned_variance)
    for k in _bar(range(len(plan.times)), request.progress):
        noise = source.step(k) if streams is None else streams[k]
        if graph:
            steps.step(noise)
        else:
            try:
                if cond is None:
                    m = network(steps.seen, times[k])
                else:
                    m = network(steps.seen, times[k], both if guided[k] else cond)
            except TypeError as error:
                explain_call(error, request.model, cond)
                raise
            check_tensor("the model's output", m, "output")
            if simple:
                steps.step(k, m, guided[k], noise, copies[k])
            else:
                wanted = watcher is not None and watcher.wants_x0(k)
                _general_step(plan, guidance, steps, k, m, noise, copies[k], wanted, times[k])
        if watcher is not None:
            watcher.show(k, copies[k])
    return (steps.x, watcher.trajectory()) if request.return_trajectory else steps.x


def _general_step(
    plan: Plan, guidance: Guidance, steps: Any, k: int, m: Tensor, noise: Tensor | int | None, copies: int,
    want_x0: bool, time: Tensor,
) -> None:  # fmt: skip
    """The step of row k for runs with rare options: a learned variance, an option that looks at the network's output,
    or a wanted x0 estimate."""
    guided, variance, options = guidance.guided[k], None, {}
    if plan.learned_variance:
        m, variance = _variance(m, steps.x.shape, guided)
    elif guidance.looks and m.shape != steps.seen.shape:
        raise ValueError(f"the model returned shape {tuple(m.shape)} for an input of {tuple(steps.seen.shape)}.")
    if guidance.looks:
        check_floating(model_output=m)
        m, options = guidance.prepare(k, steps, m, guided, variance, time, noise)
        guided = False  # it is one now
    steps.step(k, m, guided, noise, copies, want_x0, variance, **options)


def _start(request: Request, plan: Plan, source: NoiseSource) -> Tensor:
    """x before the first row, churn included."""
    x, device, dtype = request.x, request.device, request.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if x is None:
        z = source.initial
        assert z is not None
        x = plan.initial_std * (z if isinstance(z, Tensor) else ops.materialize(z, request.shape, device)).to(wide)
    x = x.to(device, dtype)
    if plan.start is not None:
        factor, strength = plan.start
        x = factor * x.to(wide)
        if strength:
            x = x + strength * source.churn().to(wide)
        x = x.to(dtype)
    return x


def _model_time(plan: Plan, device: Any, dtype: Any) -> Tensor:
    """The time that the network is called with in each row, [rows]. It is a copy, because a network may change it."""
    time = plan.model_time.to(device, copy=True)
    if time.is_floating_point():
        time = time.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return time


def _of_batches(model_time: Tensor, guided: Sequence[bool], batch: int) -> list[Tensor]:
    """``model_time`` for a batch, one tensor a row: [batch], or [2 batch] if the row is guided."""
    halves = model_time[:, None].expand(-1, batch).unbind(0)
    if not any(guided):
        return list(halves)
    wholes = model_time[:, None].expand(-1, 2 * batch).unbind(0)
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


def _bar(steps: range, progress: bool) -> Any:
    if not progress:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, desc="sampling", leave=False)
