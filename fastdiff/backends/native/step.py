"""The sampler step on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import StepCall, made_from
from ...torch_access import _C
from ..interface import Backend, differentiable
from .launch import arrange, contiguous, empty, in_format_of, masked, memory, source, unsuited


def declines(call: StepCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    tensors = (*call.data, call.guidance, call.row, call.threshold, call.mask)
    because = unsuited(*tensors, *made_from(call.noise), *made_from(call.known_noise), call.model_input)
    if because:
        return because
    if differentiable(*tensors):
        return "gradients of a step"
    if call.model_input is not None and not call.model_input.is_contiguous():
        return "a model_input that is not contiguous"
    return "rows of more than one dimension" if call.row.ndim > 2 else ""


def run(call: StepCall, backend: Backend) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``StepCall``."""
    x, m, row, uncond, guidance, clip, history, noise, log_variance = call[:9]
    threshold, mask, known, known_noise, model_input = call[-5:]
    dtype = call.dtype or x.dtype
    per_sample = row.new_empty(1).expand((len(x),) + (1,) * (x.ndim - 1)) if row.ndim > 1 else None
    scale = None
    if uncond is not None:
        scale = guidance if isinstance(guidance, Tensor) else row.new_full((1,), guidance)
    layout, (_, scale, threshold) = arrange(x.shape, per_sample, scale, threshold)
    y = empty(x.shape, dtype, x)
    x0 = empty(x.shape, dtype, x) if call.want_x0 else None
    entry = empty(x.shape, row.dtype, x) if call.want_entry else None
    held = [contiguous(t) for t in (x, m, uncond, row, noise, log_variance, known, known_noise)]
    entries = [contiguous(t) for t in history]
    _C.step(
        layout,
        memory(held[0]),
        memory(held[1]),
        memory(held[2]),
        memory(scale),
        memory(held[3]),
        clip,
        tuple(memory(t) for t in entries),
        source(held[4]),
        memory(held[5]),
        memory(y),
        memory(x0),
        memory(entry),
        memory(threshold),
        masked(mask, x.shape),
        memory(held[6]),
        source(held[7]),
        memory(model_input),
        torch.get_num_threads(),
    )
    return in_format_of(x, y), in_format_of(x, x0), in_format_of(x, entry)
