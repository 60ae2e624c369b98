"""The sampler step on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ...calls import StepCall
from ...codes import KEPT_STEPS
from ..interface import differentiable
from . import launch
from .arguments import DATA, in_format_of, permuted, source_of, unsuited
from .coefficients import is_one
from .plan import plan, tile_of


def declines(call: StepCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    x, m, row, uncond, guidance, _, history, noise, log_variance = call[:9]
    full, seen = (x, m, uncond, *history, noise, log_variance), call.model_input
    because = unsuited(x.device, full, (row, guidance))
    if because:
        return because
    if differentiable(*full, guidance, row):
        return "gradients of a step"
    if call.dtype not in (None, x.dtype):
        return "results in another dtype than x's"
    if any(value is not None for value in (call.threshold, call.mask, call.known, call.known_noise)):
        return "a mask or a threshold"
    if seen is not None and not (x.is_contiguous() and seen.is_contiguous() and seen.dtype in DATA):
        return "a model_input that is not contiguous"
    each = (x.shape[0],) + (1,) * (x.ndim - 1)
    if uncond is not None and isinstance(guidance, Tensor) and not is_one(guidance) and guidance.shape != each:
        return "guidance by frame or token"
    return ""


def step(call: StepCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``StepCall``."""
    x, m, row, uncond, guidance, clip, history, noise, log_variance = call[:9]
    seen = call.model_input
    device = x.device
    scale = guidance if isinstance(guidance, Tensor) and uncond is not None else None
    each = row.ndim > 1 or (scale is not None and not is_one(scale))
    operands = (x, m, uncond, *history, *(None,) * (KEPT_STEPS - len(history)), noise, log_variance)
    free = not each or x.stride(0) == max(x.stride())  # samples stay the first dimension
    back, operands, _ = permuted(operands, ()) if free else _in_order(operands)
    data = operands[0]
    y = torch.empty_like(data)
    x0 = torch.empty_like(data) if call.want_x0 else None
    entry = torch.empty_like(data, dtype=torch.float32) if call.want_entry else None
    source, (kind, seed_kind, offset) = source_of(noise, device)
    tile = tile_of(data.numel(), data.element_size())
    laid = (data.shape[0],) + (1,) * (data.ndim - 1) if each else (1,) * data.ndim
    how = plan(tuple(data.shape), laid, tile, kind in ("exact", "fast"), offset)
    guided = "none" if uncond is None else "number" if scale is None else "one" if is_one(scale) else "row"
    launch.step(
        device,
        how.grid,
        (
            *(y, x0, entry, seen, *operands[:7], operands[7] if kind == "tensor" else None, operands[8]),
            *(row.contiguous(), scale if scale is None or guided == "one" else scale.contiguous(), *source),
            *(float(guidance) if guided == "number" else 1.0, 0.0 if clip is None else float(clip)),
            *(row.shape[-1] if row.ndim > 1 else 0, x.numel(), *how.numbers, how.sample_runs, how.channel_runs),
        ),
        (
            *(guided, kind, seed_kind, offset, clip is not None, seen is not None and len(seen) > len(x)),
            *(*how.constants, launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )
    if back is not None:
        return y.permute(back), x0 if x0 is None else x0.permute(back), entry if entry is None else entry.permute(back)
    return in_format_of(x, y), in_format_of(x, x0), in_format_of(x, entry)


def _in_order(tensors: tuple) -> tuple[None, list, list]:
    return None, [t.contiguous() if isinstance(t, Tensor) else t for t in tensors], []
