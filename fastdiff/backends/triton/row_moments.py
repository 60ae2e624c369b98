"""Moments of rows on a GPU, and their gradient: one launch each.

A row is whole in a program, or split over several, the last of which adds their sums up, in one order. Sums within a
tile are plain, those of tiles pairs of float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...calls import RowMomentsCall
from ...codes import MOMENTS, OF_ONE
from .. import moments
from ..interface import Backend
from . import launch
from .arguments import unsuited
from .coefficients import arrange
from .functions import derivative
from .launch import Kernel
from .pairs import pair_rounded
from .plan import Plan, plan, tile_of
from .reduction import is_last, store_pair, tile_sum, total_of
from .tiles import coefficient, load, place_of, row_of, store
from .workspace import workspace


@triton.jit
def _add_up(value, out, partials, row, part, everything, inside, there, SPLIT: tl.constexpr, R: tl.constexpr,
            EVEN: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """The sum of each row of a tile: to ``out``; or, of part of a row, to ``partials``."""
    if out is not None:
        if not EVEN:
            value = tl.where(inside, value, 0.0)
        total, low = tile_sum(value, False, R, EMULATE)
        if SPLIT:
            store_pair(partials + part, everything, total, low, there)
        else:
            tl.store(out + row, pair_rounded(total, low), mask=there)


@triton.jit
def _finish(out, partials, row, parts, everything, LANES: tl.constexpr):
    if out is not None:
        total, low = total_of(partials + row * parts, parts, everything, LANES)
        tl.store(out + row, pair_rounded(total, low))


@Kernel
def row_moments(
    u, v, sum_uu, sum_uv, sum_vv, sum_ss, sum_l1, sum_v1, sum_u, sum_v, counters, partials, rows, parts,
    units, runs, blocks, per, frames, shared,
    SPLIT: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The moments of each row; without v those of u alone."""
    run, block, start, place, inside = place_of(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    first = load(u, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    difference = first
    if v is not None:
        second = load(v, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        difference = first - second
    if R > 1:
        whole = tl.program_id(0) * R + tl.arange(0, R)
        there = whole < runs
        row = row_of(tl.minimum(whole, runs - 1), per, frames, shared, ROWS)
    else:
        row = row_of(run, per, frames, shared, ROWS)
        there = row >= 0
    part, everything = row, rows * parts
    if SPLIT:
        if ROWS == "run":
            part = row * parts + block
        else:
            stretch = run // per
            part = row * parts + (stretch // frames % shared * per + run % per) * blocks + block
    each = 2 * everything
    _add_up(first * first, sum_uu, partials, row, part, everything, inside, there, SPLIT, R, EVEN, EMULATE)
    _add_up(tl.abs(difference), sum_l1, partials + each, row, part, everything, inside, there, SPLIT, R, EVEN, EMULATE)
    _add_up(first, sum_u, partials + 2 * each, row, part, everything, inside, there, SPLIT, R, EVEN, EMULATE)
    if v is not None:
        _add_up(first * second, sum_uv, partials + 3 * each, row, part, everything, inside, there, SPLIT, R, EVEN,
                EMULATE)  # fmt: skip
        _add_up(second * second, sum_vv, partials + 4 * each, row, part, everything, inside, there, SPLIT, R, EVEN,
                EMULATE)  # fmt: skip
        _add_up(difference * difference, sum_ss, partials + 5 * each, row, part, everything, inside, there, SPLIT, R,
                EVEN, EMULATE)  # fmt: skip
        _add_up(tl.abs(second), sum_v1, partials + 6 * each, row, part, everything, inside, there, SPLIT, R, EVEN,
                EMULATE)  # fmt: skip
        _add_up(second, sum_v, partials + 7 * each, row, part, everything, inside, there, SPLIT, R, EVEN, EMULATE)
    if SPLIT:
        if is_last(counters + row, parts):
            _finish(sum_uu, partials, row, parts, everything, LANES)
            _finish(sum_l1, partials + each, row, parts, everything, LANES)
            _finish(sum_u, partials + 2 * each, row, parts, everything, LANES)
            _finish(sum_uv, partials + 3 * each, row, parts, everything, LANES)
            _finish(sum_vv, partials + 4 * each, row, parts, everything, LANES)
            _finish(sum_ss, partials + 5 * each, row, parts, everything, LANES)
            _finish(sum_v1, partials + 6 * each, row, parts, everything, LANES)
            _finish(sum_v, partials + 7 * each, row, parts, everything, LANES)


@triton.jit
def _plus(total, factor, values, row, KIND: tl.constexpr):
    if KIND == "none":
        return total
    else:
        return total + coefficient(factor, row, row, row == row, 0, KIND) * values


@Kernel
def row_moments_gradient(
    u, v, g_uu, g_uv, g_vv, g_ss, g_l1, g_v1, g_u, g_v, d_u, d_v,
    units, runs, blocks, per, frames, shared,
    UU: tl.constexpr, UV: tl.constexpr, VV: tl.constexpr, SS: tl.constexpr, L1: tl.constexpr, V1: tl.constexpr,
    ONE_U: tl.constexpr, ONE_V: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The gradients d_u and d_v, those that are wanted, from the gradients g of the moments; a moment that has none is
    of the kind "none" and left out. Rounded term by term in the reference's order."""
    run, block, start, place, inside = place_of(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    row = row_of(run, per, frames, shared, ROWS)
    first = load(u, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    second, difference = first, first
    if v is not None:
        second = load(v, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        difference = first - second
    slope = derivative(difference, 1.0, "l1", ASM)
    if d_u is not None:
        total = _plus(tl.zeros_like(first), g_u, 1.0, row, ONE_U)
        total = _plus(total, g_uu, 2.0 * first, row, UU)
        total = _plus(total, g_uv, second, row, UV)
        total = _plus(total, g_ss, 2.0 * difference, row, SS)
        total = _plus(total, g_l1, slope, row, L1)
        store(d_u, start, place, total, inside, EVEN, EMULATE)
    if d_v is not None:
        total = _plus(tl.zeros_like(first), g_v, 1.0, row, ONE_V)
        total = _plus(total, g_vv, 2.0 * second, row, VV)
        total = _plus(total, g_v1, derivative(second, 1.0, "l1", ASM), row, V1)
        total = _plus(total, g_uv, first, row, UV)
        total = _plus(total, g_ss, -2.0 * difference, row, SS)
        total = _plus(total, g_l1, -slope, row, L1)
        store(d_v, start, place, total, inside, EVEN, EMULATE)


def declines(call: RowMomentsCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    return unsuited(call.a.device, (call.a, call.b), ()) or moments.fits(call)


def run(call: RowMomentsCall, backend: Backend) -> tuple[Tensor | None, ...]:
    """See ``RowMomentsCall``."""
    return moments.run(call, backend, _launch)


def _launch(call: RowMomentsCall) -> tuple[Tensor | None, ...]:
    laid = moments.lay(call)
    device, how = call.a.device, _plan(laid)
    sums = [
        torch.empty(laid.row_shape, dtype=torch.float32, device=device)
        if call.b is not None or name in OF_ONE
        else None
        for name in MOMENTS
    ]
    space = workspace(device, how.rows, 2 * len(MOMENTS) * how.rows * how.parts)
    row_moments(
        device,
        how.grid,
        (laid.a, laid.b, *sums, space.counters, space.partials, how.rows, how.parts, *how.numbers),
        (how.parts > 1, 8 if launch.INTERPRETED else 128, *_constants(how, device)),
    )
    return tuple(None if total is None else laid.rows_as_asked(total, call) for total in sums)


def gradient(
    upstream: Sequence[Tensor | None], call: RowMomentsCall, backend: Backend, for_a: bool, for_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """See ``Backend.gradient``."""
    laid = moments.lay(call)
    device, how = call.a.device, _plan(laid)
    rows = arrange(tuple(laid.a.shape), *(laid.rows_as_laid(g, call) for g in upstream), rows=laid.rows)
    d_a, d_b = (torch.empty_like(x) if needed else None for x, needed in ((laid.a, for_a), (laid.b, for_b)))
    row_moments_gradient(
        device,
        how.grid,
        (laid.a, laid.b, *rows.pointers, d_a, d_b, *how.numbers),
        (*rows.kinds, *_constants(how, device)),
    )
    return laid.as_asked(d_a), laid.as_asked(d_b)


def _plan(laid: moments.Laid) -> Plan:
    tile = tile_of(laid.a.numel(), laid.a.element_size())
    return plan(tuple(laid.a.shape), laid.rows, tile, sums=True)


def _constants(how: Plan, device: torch.device) -> tuple:
    rows, r, c, unit, grid, _, even, wide = how.constants
    return rows, r, c, unit, grid, even, wide, launch.has_approximate_instructions(device), launch.INTERPRETED
