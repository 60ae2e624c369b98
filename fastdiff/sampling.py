"""The sampling loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops, samplers
from .objective import draw_seed
from .ops.noise import Stream
from .prediction import Prediction
from .process import Process


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    shape: tuple[int, ...],
    process: Process,
    sampler: str | samplers.Sampler = "ddpm",
    steps: int | None = None,
    prediction: str | Prediction = "epsilon",
    *,
    cond: Any = None,
    uncond: Any = None,
    guidance: float = 1.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Callable[[int, tuple[int, ...]], Tensor] | None = None,
    x: Tensor | None = None,
    sample_offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    callback: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draw samples from a trained network.

    Args:
        model: called as ``model(x, t)``, or ``model(x, t, cond)`` with a condition; t is [batch], the ``model_time`` of
            training. It is used as it is: call ``.eval()`` first if it has dropout.
        shape: [batch, ...] of the samples.
        process, prediction: those of training.
        sampler: "ddpm", "ddim", or an object of ``fastdiff.samplers``.
        steps: the number of steps; None: all of a discrete process, 50 for others.
        cond: a tensor [batch, ...], or a tuple, list or dict of such, given to the model.
        uncond: the same for classifier-free guidance (Ho and Salimans 2022); then the model sees a batch of twice the
            size, the unconditional half first.
        guidance: m_uncond + guidance (m_cond - m_uncond). 1 is no guidance; other values need ``uncond``.
        seed, generator: what the noise is made from, by sample index; without either, PyTorch's default generator.
        noise: ``noise(step, shape)`` gives the noise of a step instead.
        x: where to start; None: noise from the seed.
        sample_offset: the index of the first sample. With one seed, 8 samples are 4 and another 4 with offset 4.
        device: None: that of x, or of the model's parameters.
        dtype: of the samples and of what the model sees.
        progress: show a bar, if tqdm is installed.
        callback: ``callback(step, t, x, x0)`` after every step: the step's t, the new x and the x0 estimate.

    Returns the samples, of ``shape`` and ``dtype``. Raises ValueError or TypeError for unfit inputs, before the first
    call of the model.
    """
    plan = samplers.get(sampler).plan(process, steps, prediction)
    shape = tuple(shape)
    if guidance != 1.0 and uncond is None:
        raise ValueError(f"guidance={guidance} needs uncond: the condition of the unconditional half.")
    if uncond is not None and cond is None:
        raise ValueError("uncond was given without cond.")
    if seed is not None and generator is not None:
        raise ValueError("pass a seed or a generator, not both.")
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, but shape is {shape}.")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point; got {dtype}.")
    device = _device(model, x, device)
    if seed is None and (x is None or (noise is None and any(plan.draws))):
        seed = draw_seed(generator, device)

    if x is None:
        x = plan.initial_std * ops.Philox(seed, sample_offset, Stream.INITIAL).tensor(shape, device)
    x = x.to(device, dtype)
    table = plan.table.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    times, model_time = plan.times.to(device), plan.model_time.to(device)
    if model_time.is_floating_point():
        model_time = model_time.to(table.dtype)
    if uncond is not None and guidance != 1.0:
        cond = _both(uncond, cond)

    for k in _bar(range(len(times)), progress):
        seen = x if plan.model_scale is None else (float(plan.model_scale[k]) * x).to(dtype)
        m, half, variance = _call(model, seen, model_time[k], cond, guidance != 1.0, plan.learned_variance)
        z = None
        if plan.draws[k]:
            if noise is not None:
                z = noise(k, shape).to(device)
            else:
                z = ops.Philox(seed, sample_offset, Stream.STEP + k)
        x, x0, _ = ops.step(
            x,
            m,
            table[k],
            uncond=half,
            guidance=guidance,
            clip=plan.clip,
            noise=z,
            log_variance=variance,
            return_x0=callback is not None,
            return_entry=False,
        )
        if callback is not None:
            callback(k, times[k], x, x0)
    return x


def _call(
    model: Callable[..., Tensor], x: Tensor, time: Tensor, cond: Any, guided: bool, learned_variance: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(conditional output, unconditional output or None, variance output or None)."""
    batch = len(x)
    if guided:
        x = torch.cat([x, x])
    time = time.expand(len(x))
    output = model(x, time) if cond is None else model(x, time, cond)
    variance = None
    if learned_variance:
        if output.ndim < 2 or output.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"a learned variance needs a network that returns {2 * x.shape[1]} channels, prediction and variance; "
                f"got shape {tuple(output.shape)}."
            )
        output, variance = output.chunk(2, dim=1)
    if output.shape != x.shape:
        raise ValueError(f"the model returned shape {tuple(output.shape)} for an input of {tuple(x.shape)}.")
    if not guided:
        return output, None, variance
    return output[batch:], output[:batch], None if variance is None else variance[batch:]


def _both(uncond: Any, cond: Any) -> Any:
    if isinstance(cond, Tensor):
        return torch.cat([uncond, cond])
    if isinstance(cond, dict):
        return {key: _both(uncond[key], value) for key, value in cond.items()}
    if isinstance(cond, (tuple, list)):
        return type(cond)(_both(a, b) for a, b in zip(uncond, cond))
    raise TypeError(f"cond must be a tensor, or a tuple, list or dict of tensors; got {type(cond).__name__}.")


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
