"""The affine kernel: noising, normals, conversion, and the gradients of these."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ... import modes
from ...calls import Packed
from ...tensors import as_tensor
from ..interface import differentiable
from . import launch
from .arguments import fits, source_of, starts_on, untouched
from .coefficients import arrange
from .launch import Kernel
from .plan import order_of, plan, plan_of_sequences, tile_of
from .tiles import (
    coefficient,
    entry_of,
    laid_out,
    load,
    made_noise,
    place_of,
    place_packed,
    prefetch,
    row_of,
    spot_of,
    store,
)


@Kernel
def affine(
    out, kept, target, u, v, xi, a, b, p, q, index, seed, ids, xi_seed, xi_ids, starts,
    stream, sample_offset, strength, xi_stream, xi_sample_offset, xi_strength, gamma,
    steps, stride, units, runs, blocks, per, frames, shared, sample_runs, channel_runs,
    c_size, c_factor, c_shift, h_size, h_factor, h_shift, w_size, w_factor, w_shift,
    A_KIND: tl.constexpr, B_KIND: tl.constexpr, P_KIND: tl.constexpr, Q_KIND: tl.constexpr, INDEX: tl.constexpr,
    V: tl.constexpr, SEED: tl.constexpr, OFFSET: tl.constexpr,
    XI: tl.constexpr, XI_SEED: tl.constexpr, XI_OFFSET: tl.constexpr,
    ORDER: tl.constexpr, PATCH_P: tl.constexpr, PATCH_Q: tl.constexpr, IN_ROW: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr, SAMPLES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out = a u + b (v + gamma xi), kept = v, target = p u + q v. v and xi are tensors ("tensor"), or made ("exact",
    "fast") or "none". out and target may lie in another ORDER.

    Products and sums are rounded one by one, as in the reference: the kernel is compiled without contraction, but for
    noise of the fast transform, which has not the reference's bits in any case.
    """
    if GRID == "packed":
        run, block, start, place, inside, units = place_packed(starts, C, UNIT, WIDE)
        if block * C >= units * UNIT:
            return
    else:
        run, block, start, place, inside = place_of(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    if V != "none" and V != "tensor" and (A_KIND != "none" or P_KIND != "none"):
        prefetch(u, start, block, units, R, C, UNIT, EVEN, ASM)
    row = row_of(run, per, frames, shared, ROWS)
    entry, found = entry_of(index, row, steps, INDEX)
    # Fast noise that is not needed itself is made with its factor in it.
    SCALED: tl.constexpr = V == "fast" and (XI == "fast" or XI == "none") and kept is None and target is None
    if out is not None and V != "none":
        scale = coefficient(b, row, entry, found, stride, B_KIND)
    made = place
    if A_KIND != "none" or P_KIND != "none":
        data = load(u, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        # The noise is used twice, or where the data is not.
        if out is not None and (kept is not None or target is not None or ORDER != "none"):
            made = laid_out(place, data, EMULATE)
    if V == "tensor":
        n = load(v, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    elif V != "none":
        n = made_noise(seed, ids, stream, sample_offset, strength, scale if SCALED else 1.0, run, block, made, units,
                       sample_runs, channel_runs, SEED, OFFSET, C, UNIT, SAMPLES, V == "fast", ASM,
                       EMULATE)  # fmt: skip
    out_start, out_place = spot_of(start, place, (c_size, c_factor, c_shift), (h_size, h_factor, h_shift),
        (w_size, w_factor, w_shift), ORDER, PATCH_P, PATCH_Q, IN_ROW)  # fmt: skip
    if kept is not None:
        store(kept, start, place, n, inside, EVEN, EMULATE)
    if target is not None:
        if P_KIND != "none":
            second = coefficient(p, row, entry, found, stride, P_KIND) * data
        if Q_KIND != "none":
            term = coefficient(q, row, entry, found, stride, Q_KIND) * n
            second = term if P_KIND == "none" else second + term
        store(target, out_start, out_place, second, inside, EVEN, EMULATE)
    if out is not None:
        if V != "none":
            if XI == "tensor":
                n = n + gamma * load(xi, start, place, inside, EVEN, UNIT, ASM, EMULATE)
            elif XI != "none":
                n = n + gamma * made_noise(
                    xi_seed, xi_ids, xi_stream, xi_sample_offset, xi_strength, scale if SCALED else 1.0, run, block,
                    made, units, sample_runs, channel_runs, XI_SEED, XI_OFFSET, C, UNIT, SAMPLES, XI == "fast", ASM,
                    EMULATE,
                )  # fmt: skip
            value = n if SCALED else scale * n
        if A_KIND != "none":
            first = coefficient(a, row, entry, found, stride, A_KIND) * data
            value = first if V == "none" else first + value
        store(out, out_start, out_place, value, inside, EVEN, EMULATE)


def affine_launch(
    shape: tuple[int, ...], device: torch.device, u: Tensor | None, a: Any, v: Any, b: Any,
    out: Tensor | None, kept: Tensor | None = None, gamma: float = 0.0, xi: Any = None,
    target: Tensor | None = None, p: Any = None, q: Any = None, order: str = "none", packed: Packed | None = None,
) -> tuple[tuple[int, int], tuple, tuple]:  # fmt: skip
    """The launch of out = a u + b (v + gamma xi), kept = v, target = p u + q v: (grid, arguments, constants). Tensors
    are contiguous, but out and target lie in ``order`` (``layout.TOKENS``); v and xi may be a ``Philox``."""
    rows = arrange(shape, a, b, p, q, rows=None if packed is None else packed.rows(shape))
    (seed, ids, *of_v), (kind, seed_kind, offset) = source_of(v, device)
    (xi_seed, xi_ids, *of_xi), (xi_kind, xi_seed_kind, xi_has_offset) = source_of(xi, device)
    made = kind in ("exact", "fast") or xi_kind in ("exact", "fast")
    written = out if out is not None else kept
    tile = tile_of(written.numel(), written.element_size())
    starts = None
    if packed is None:
        how = plan(shape, rows.shape, tile, made, offset or xi_has_offset)
    else:
        how, starts = plan_of_sequences(packed, shape, tile), starts_on(device, packed)
    numbers, ordered = order_of(order, shape, how)
    return (
        how.grid,
        (
            *(out, kept, target, u, v if kind == "tensor" else None, xi if xi_kind == "tensor" else None),
            *(*rows.pointers, rows.index, seed, ids, xi_seed, xi_ids, starts, *of_v, *of_xi, gamma),
            *(rows.steps, rows.stride, *how.numbers, how.sample_runs, how.channel_runs, *numbers),
        ),
        (
            *(*rows.kinds, rows.index_kind, kind, seed_kind, offset, xi_kind, xi_seed_kind, xi_has_offset),
            *(*ordered, *how.constants, launch.has_approximate_instructions(device), launch.INTERPRETED),
        ),
    )


def run(shape: tuple[int, ...], device: torch.device, *operands: Any, packed: Packed | None = None) -> None:
    """Launch the kernel: see ``affine_launch``."""
    affine(device, *affine_launch(shape, device, *operands, packed=packed))


def scaled(gradient: Tensor, wanted: Any, packed: Packed | None = None) -> list[Tensor | None]:
    """row * gradient, rounded once, for each (row, dtype, whether it is wanted)."""
    results: list[Tensor | None] = []
    for row, dtype, needed in wanted:
        if not needed:
            results.append(None)
        elif (
            differentiable(gradient)
            or not fits(gradient)
            or not gradient.numel()
            or not untouched()
            or modes.is_many(gradient)
        ):
            row = as_tensor(row) if packed is None else packed.spread(row, gradient.shape)
            results.append((row * gradient.to(torch.float32)).to(dtype))
        else:
            out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
            run(tuple(out.shape), out.device, gradient.contiguous(), row, None, None, out, packed=packed)
            results.append(out)
    return results
