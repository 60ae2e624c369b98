"""Latents of an autoencoder's moments on a GPU with their noising, and their gradient: one launch each.

Both halves of the moments are read, and of the gradient written, in place. Noise is made again for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...calls import PosteriorCall
from .. import latents
from ..interface import COEFFICIENTS, Backend, differentiable
from . import launch
from .arguments import source_of, unsuited
from .coefficients import arrange
from .functions import exponential
from .launch import Kernel
from .philox import narrow, widen
from .plan import plan, tile_of
from .tiles import (
    coefficient,
    entry_of,
    halves_of,
    laid_out,
    load,
    made_noise,
    place_of,
    prefetch,
    row_of,
    store,
)


@triton.jit
def _deviation(log_variance, least, most, ASM: tl.constexpr, EMULATE: tl.constexpr):
    return exponential(0.5 * tl.clamp(log_variance, least, most, tl.PropagateNan.ALL), ASM, EMULATE)


@Kernel
def posterior(
    moments, z, x_t, kept, xi, n, shift, scale, alpha, sigma, index, seed, ids, xi_seed, xi_ids,
    stream, sample_offset, strength, xi_stream, xi_sample_offset, xi_strength, least, most,
    steps, stride, units, runs, blocks, per, frames, shared, sample_runs, channel_runs,
    SHIFT_KIND: tl.constexpr, SCALE_KIND: tl.constexpr, ALPHA_KIND: tl.constexpr, SIGMA_KIND: tl.constexpr,
    INDEX: tl.constexpr, N: tl.constexpr, SEED: tl.constexpr, OFFSET: tl.constexpr,
    XI: tl.constexpr, XI_SEED: tl.constexpr, XI_OFFSET: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr, SAMPLES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """z = (mean + exp(log-variance / 2) xi - shift) scale, x_t = alpha z + sigma n, kept = n: those that are there. xi
    and n are tensors ("tensor"), or made ("exact", "fast") or "none". Rounded operation by operation, as ``affine``."""
    run, block, start, place, inside = place_of(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    first, second = halves_of(start, run, units, sample_runs, UNIT, SAMPLES)
    if N == "exact" or N == "fast" or XI == "exact" or XI == "fast":
        prefetch(moments, first, block, units, R, C, UNIT, EVEN, ASM)
        if XI != "none":
            prefetch(moments, second, block, units, R, C, UNIT, EVEN, ASM)
    row = row_of(run, per, frames, shared, ROWS)
    entry, found = entry_of(index, row, steps, INDEX)
    value = load(moments, first, place, inside, EVEN, UNIT, ASM, EMULATE)
    made = laid_out(place, value, EMULATE)  # each noise goes into two results
    if XI != "none":
        if XI == "tensor":
            noise = load(xi, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        else:
            noise = made_noise(xi_seed, xi_ids, xi_stream, xi_sample_offset, xi_strength, 1.0, run, block, made, units,
                               sample_runs, channel_runs, XI_SEED, XI_OFFSET, C, UNIT, SAMPLES, XI == "fast", ASM,
                               EMULATE)  # fmt: skip
        log_variance = load(moments, second, place, inside, EVEN, UNIT, ASM, EMULATE)
        value += _deviation(log_variance, least, most, ASM, EMULATE) * noise
    if SHIFT_KIND != "none":
        value -= coefficient(shift, row, entry, found, stride, SHIFT_KIND)
    value *= coefficient(scale, row, entry, found, stride, SCALE_KIND)
    store(z, start, place, value, inside, EVEN, EMULATE)
    if x_t is not None:
        value = widen(narrow(value, z.dtype.element_ty, EMULATE), False, EMULATE)  # as it is stored
        if N == "tensor":
            noise = load(n, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        else:
            noise = made_noise(seed, ids, stream, sample_offset, strength, 1.0, run, block, made, units, sample_runs,
                               channel_runs, SEED, OFFSET, C, UNIT, SAMPLES, N == "fast", ASM, EMULATE)  # fmt: skip
        if kept is not None:
            store(kept, start, place, noise, inside, EVEN, EMULATE)
        value = coefficient(alpha, row, entry, found, stride, ALPHA_KIND) * value
        value += coefficient(sigma, row, entry, found, stride, SIGMA_KIND) * noise
        store(x_t, start, place, value, inside, EVEN, EMULATE)


@Kernel
def posterior_gradient(
    moments, d_z, d_x_t, gradient, xi, scale, alpha, index, seed, ids,
    stream, sample_offset, strength, least, most,
    steps, stride, units, runs, blocks, per, frames, shared, sample_runs, channel_runs,
    SCALE_KIND: tl.constexpr, ALPHA_KIND: tl.constexpr, INDEX: tl.constexpr,
    N: tl.constexpr, SEED: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr, SAMPLES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """By the moments, from those of z and x_t that are there. xi is a tensor, or made, or "none": see ``posterior``."""
    run, block, start, place, inside = place_of(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    first, second = halves_of(start, run, units, sample_runs, UNIT, SAMPLES)
    if N == "exact" or N == "fast":
        prefetch(moments, second, block, units, R, C, UNIT, EVEN, ASM)
        if d_z is not None:
            prefetch(d_z, start, block, units, R, C, UNIT, EVEN, ASM)
        if d_x_t is not None:
            prefetch(d_x_t, start, block, units, R, C, UNIT, EVEN, ASM)
    row = row_of(run, per, frames, shared, ROWS)
    entry, found = entry_of(index, row, steps, INDEX)
    if d_x_t is not None:
        slope = load(d_x_t, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        slope = coefficient(alpha, row, entry, found, stride, ALPHA_KIND) * slope
        if d_z is not None:
            slope = load(d_z, start, place, inside, EVEN, UNIT, ASM, EMULATE) + slope
    else:
        slope = load(d_z, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    slope = coefficient(scale, row, entry, found, stride, SCALE_KIND) * slope
    store(gradient, first, place, slope, inside, EVEN, EMULATE)
    if N == "none":
        slope = tl.zeros_like(slope)
    else:
        if N == "tensor":
            noise = load(xi, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        else:
            noise = made_noise(seed, ids, stream, sample_offset, strength, 1.0, run, block, place, units, sample_runs,
                               channel_runs, SEED, OFFSET, C, UNIT, SAMPLES, N == "fast", ASM, EMULATE)  # fmt: skip
        log_variance = load(moments, second, place, inside, EVEN, UNIT, ASM, EMULATE)
        growth = _deviation(log_variance, least, most, ASM, EMULATE) * noise
        slope = tl.where((log_variance >= least) & (log_variance <= most), 0.5 * growth * slope, 0.0)
    store(gradient, second, place, slope, inside, EVEN, EMULATE)


def declines(call: PosteriorCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    moments, xi, shift, scale, n, alpha, sigma = call[:7]
    because = unsuited(moments.device, (moments, xi, n), (shift, scale, alpha, sigma))
    return because or (COEFFICIENTS if differentiable(*call[1:7]) else "")


def run(call: PosteriorCall, backend: Backend) -> tuple[Tensor, Tensor | None, Any]:
    """See ``PosteriorCall``; alpha and sigma may be ``Gathered``."""
    return latents.run(call, backend, _launch)


def _launch(call: PosteriorCall) -> tuple[Tensor, Tensor | None, Any]:
    shape, device, n = tuple(call.shape), call.moments.device, call.n
    z = torch.empty(shape, dtype=call.dtype, device=device)
    x_t, kept = None if n is None else torch.empty_like(z), None
    if call.keep_noise and n is not None and not isinstance(n, Tensor):
        kept = torch.empty(shape, dtype=torch.float32, device=device)
    moments, xi, given = (t.contiguous() if isinstance(t, Tensor) else t for t in (call.moments, call.xi, n))
    rows = arrange(shape, call.shift, call.scale, call.alpha, call.sigma)
    (seed, ids, *source), (kind, seed_kind, offset) = source_of(given, device)
    (xi_seed, xi_ids, *xi_source), (xi_kind, xi_seed_kind, xi_offset) = source_of(xi, device)
    how = plan(shape, rows.shape, tile_of(z.numel(), z.element_size()), True, offset or xi_offset)
    *constants, wide = how.constants
    posterior(
        device,
        how.grid,
        (
            *(moments, z, x_t, kept, xi if xi_kind == "tensor" else None, given if kind == "tensor" else None),
            *(*rows.pointers, rows.index, seed, ids, xi_seed, xi_ids, *source, *xi_source, call.least, call.most),
            *(rows.steps, rows.stride, *how.numbers, how.sample_runs, how.channel_runs),
        ),
        (
            *(*rows.kinds, rows.index_kind, kind, seed_kind, offset, xi_kind, xi_seed_kind, xi_offset),
            *(*constants, wide or moments.numel() + 4096 >= 2**31),
            *(launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )
    return z, x_t, n if kept is None else kept


def gradient(upstream: tuple[Tensor | None, Tensor | None], call: PosteriorCall, backend: Backend) -> Tensor:
    """See ``Backend.gradient``."""
    d_z, d_x_t = (d if d is None else d.contiguous() for d in upstream)
    shape, device = tuple(call.shape), call.moments.device
    moments, xi = call.moments.contiguous(), call.xi.contiguous() if isinstance(call.xi, Tensor) else call.xi
    made = torch.empty(moments.shape, dtype=moments.dtype, device=device)
    rows = arrange(shape, call.scale, None if d_x_t is None else call.alpha)
    (seed, ids, *source), (kind, seed_kind, offset) = source_of(xi, device)
    how = plan(shape, rows.shape, tile_of(moments.numel() // 2, moments.element_size()), True, offset)
    *constants, wide = how.constants
    posterior_gradient(
        device,
        how.grid,
        (
            *(None if kind == "none" else moments, d_z, d_x_t, made, xi if kind == "tensor" else None),
            *(*rows.pointers, rows.index, seed, ids, *source, call.least, call.most),
            *(rows.steps, rows.stride, *how.numbers, how.sample_runs, how.channel_runs),
        ),
        (
            *(*rows.kinds, rows.index_kind, kind, seed_kind, offset),
            *(*constants, wide or moments.numel() + 4096 >= 2**31),
            *(launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )
    return made
