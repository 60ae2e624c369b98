"""The sampler step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import StepCall
from ...codes import COLUMNS
from ..interface import Backend


def declines(call: StepCall) -> str:
    return ""


def run(call: StepCall, backend: Backend) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``StepCall``."""
    noise, known_noise = (backend.materialize(n, call.x.shape, call.x.device) for n in (call.noise, call.known_noise))
    x, m, row, uncond, guidance, clip = call[:6]
    mask, known, model_input, dtype = call.mask, call.known, call.model_input, call.dtype or x.dtype
    shape = row.shape[:-1] + (1,) * (x.ndim if row.ndim > 1 else 0)
    at = {name: row[..., k].reshape(shape[: x.ndim]) for k, name in enumerate(COLUMNS)}
    compute = row.dtype
    x, m = x.to(compute), m.to(compute)
    if uncond is not None:
        uncond = uncond.to(compute)
        m = uncond + guidance * (m - uncond)
    x0 = at["p_x"] * x + at["p_m"] * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    if call.threshold is not None:
        x0 = x0.clamp(-call.threshold, call.threshold) / call.threshold
    y = at["c_x"] * x + at["c_m"] * m + at["c_x0"] * x0
    for j, entry in enumerate(call.history, start=1):
        y = y + at[f"c_h{j}"] * entry.to(compute)
    if noise is not None:
        strength = at["c_noise"]
        if call.log_variance is not None:
            strength = strength * torch.exp(0.5 * (at["l_0"] + at["l_v"] * call.log_variance.to(compute)))
        y = y + strength * noise.to(compute)
    if mask is not None:
        kept = at["k_x0"] * known.to(compute)
        if known_noise is not None:
            kept = kept + at["k_n"] * known_noise.to(compute)
        mask = mask.to(compute)
        y = mask * kept + (1 - mask) * y
    if model_input is not None:
        seen = (at["c_in"] * y).to(model_input.dtype)
        for part in model_input.split(len(y)) if len(y) else ():
            part.copy_(seen)
    entry = at["h_x"] * x + at["h_m"] * m + at["h_x0"] * x0 if call.want_entry else None
    return y.to(dtype), x0.to(dtype) if call.want_x0 else None, entry
