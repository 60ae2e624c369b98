"""The sampler step on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ... import codes
from ...calls import StepCall
from ...codes import KEPT_STEPS
from ..interface import Backend, differentiable
from . import launch
from .arguments import DATA, in_format_of, permuted, source_of, unsuited
from .coefficients import is_one
from .functions import accurate_exp
from .launch import Kernel
from .plan import plan, tile_of
from .tiles import load, made_noise, place_of, prefetch, row_of, store

# The columns of a table of steps. (Only a kernel may use such a number, not a function that kernels call: by Triton's
# hash, under which compiled kernels are found again, it would be another one according to which was compiled first.)
P_X, P_M, C_X, C_M, C_X0, C_H1, C_H2, C_H3, C_H4, C_NOISE, L_0, L_V, H_X, H_M, H_X0, K_X0, K_N, C_IN = (
    tl.constexpr(column) for column in range(len(codes.COLUMNS))
)


@Kernel
def step(
    y, x0_out, entry, seen, x, m, uncond, h1, h2, h3, h4, v, log_variance, table, scale, seed, ids,
    stream, sample_offset, strength, guidance, clip,
    width, total, units, runs, blocks, per, frames, shared, sample_runs, channel_runs,
    GUIDED: tl.constexpr, V: tl.constexpr, SEED: tl.constexpr, OFFSET: tl.constexpr, CLIPPED: tl.constexpr,
    TWICE: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr, SAMPLES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One sampler step: see ``codes.COLUMNS`` for what the columns of ``table`` mean.

    GUIDED: by the number ``guidance``, or by ``scale``, "one" or one a "row"; width: of the table, 0 for a single row.
    seen: the next model input, written again ``total`` elements on if TWICE.
    """
    run, block, start, place, inside = place_of(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    row = row_of(run, per, frames, shared, ROWS)
    at = table + row * width
    if V != "none" and V != "tensor":
        prefetch(x, start, block, units, R, C, UNIT, EVEN, ASM)
        prefetch(m, start, block, units, R, C, UNIT, EVEN, ASM)
    state = load(x, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    model = load(m, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if GUIDED != "none":
        free = load(uncond, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        if GUIDED == "number":
            model = free + guidance * (model - free)
        elif GUIDED == "one":
            model = free + tl.load(scale) * (model - free)
        else:
            model = free + tl.load(scale + row) * (model - free)
    data = tl.load(at + P_X) * state + tl.load(at + P_M) * model
    if CLIPPED:
        data = tl.where(data > clip, clip, tl.where(data < -clip, -clip, data))  # NaN stays
    value = tl.load(at + C_X) * state + tl.load(at + C_M) * model + tl.load(at + C_X0) * data
    if h1 is not None:
        value = value + tl.load(at + C_H1) * load(h1, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if h2 is not None:
        value = value + tl.load(at + C_H2) * load(h2, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if h3 is not None:
        value = value + tl.load(at + C_H3) * load(h3, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if h4 is not None:
        value = value + tl.load(at + C_H4) * load(h4, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if V != "none":
        if V == "tensor":
            z = load(v, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        else:
            z = made_noise(seed, ids, stream, sample_offset, strength, 1.0, run, block, place, units, sample_runs,
                           channel_runs, SEED, OFFSET, C, UNIT, SAMPLES, V == "fast", ASM, EMULATE)  # fmt: skip
        strong = tl.load(at + C_NOISE)
        if log_variance is not None:
            learned = load(log_variance, start, place, inside, EVEN, UNIT, ASM, EMULATE)
            strong = strong * accurate_exp(0.5 * (tl.load(at + L_0) + tl.load(at + L_V) * learned))
        value = value + strong * z
    store(y, start, place, value, inside, EVEN, EMULATE)
    if x0_out is not None:
        store(x0_out, start, place, data, inside, EVEN, EMULATE)
    if entry is not None:
        kept = tl.load(at + H_X) * state + tl.load(at + H_M) * model + tl.load(at + H_X0) * data
        store(entry, start, place, kept, inside, EVEN, EMULATE)
    if seen is not None:
        ahead = tl.load(at + C_IN) * value
        store(seen, start, place, ahead, inside, EVEN, EMULATE)
        if TWICE:
            store(seen + total, start, place, ahead, inside, EVEN, EMULATE)


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


def run(call: StepCall, backend: Backend) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``StepCall``."""
    x, m, row, uncond, guidance, _, history, noise, log_variance = call[:9]
    scale = guidance if isinstance(guidance, Tensor) and uncond is not None else None
    each = row.ndim > 1 or (scale is not None and not is_one(scale))
    operands = (x, m, uncond, *history, *(None,) * (KEPT_STEPS - len(history)), noise, log_variance)
    free = not each or x.stride(0) == max(x.stride())  # samples stay the first dimension
    back, operands, _ = permuted(operands, ()) if free else _in_order(operands)
    data = operands[0]
    y = torch.empty_like(data)
    x0 = torch.empty_like(data) if call.want_x0 else None
    entry = torch.empty_like(data, dtype=torch.float32) if call.want_entry else None
    step(x.device, *step_launch(call, operands, (y, x0, entry, call.model_input), each))
    if back is not None:
        return y.permute(back), x0 if x0 is None else x0.permute(back), entry if entry is None else entry.permute(back)
    return in_format_of(x, y), in_format_of(x, x0), in_format_of(x, entry)


def step_launch(
    call: StepCall, operands: Sequence[Any], results: tuple[Tensor | None, ...], each: bool = False
) -> tuple[tuple[int, int], tuple, tuple]:
    """The launch of a step: (grid, arguments, constants).

    Args:
        operands: x, m, uncond, four history entries, noise and log-variance of ``call``, contiguous in one order.
        results: y, x0 estimate, history entry and model input.
        each: a sample has a row, or a guidance scale, of its own.
    """
    row, uncond, guidance, clip = call.row, call.uncond, call.guidance, call.clip
    data, device, seen = operands[0], call.x.device, results[3]
    scale = guidance if isinstance(guidance, Tensor) and uncond is not None else None
    source, (kind, seed_kind, offset) = source_of(call.noise, device)
    tile = tile_of(data.numel(), data.element_size())
    laid = (data.shape[0],) + (1,) * (data.ndim - 1) if each else (1,) * data.ndim
    how = plan(tuple(data.shape), laid, tile, kind in ("exact", "fast"), offset)
    guided = "none" if uncond is None else "number" if scale is None else "one" if is_one(scale) else "row"
    return (
        how.grid,
        (
            *(*results, *operands[:7], operands[7] if kind == "tensor" else None, operands[8]),
            *(row.contiguous(), scale if scale is None or guided == "one" else scale.contiguous(), *source),
            *(float(guidance) if guided == "number" else 1.0, 0.0 if clip is None else float(clip)),
            *(row.shape[-1] if row.ndim > 1 else 0, data.numel(), *how.numbers, how.sample_runs, how.channel_runs),
        ),
        (
            *(guided, kind, seed_kind, offset, clip is not None, seen is not None and len(seen) > data.shape[0]),
            *(*how.constants, launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )


def _in_order(tensors: tuple) -> tuple[None, list, list]:
    return None, [t.contiguous() if isinstance(t, Tensor) else t for t in tensors], []
