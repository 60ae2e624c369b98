"""Normals on a GPU: of whole samples, and of slices of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...calls import NormalCall
from ..interface import Backend
from . import affine, launch
from .arguments import DATA, Seeded, device_of, makes, samples_on, seed_of, too_many
from .launch import Kernel
from .philox import narrow, normals

_BLOCK = 1024
_OUTER = 4  # dimensions that a slice may have besides its runs


@Kernel
def windowed(
    out, seed, ids, stream, sample_offset, first, t1, t2, t3, t4, per, m1, m2, m3, width, number,
    SEED: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
    ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Noise of a slice of each sample.

    A slice has ``width`` elements, in runs of ``per`` neighbours, whose places in the whole sample begin at ``first``
    and lie ``t1`` apart; ``m1`` of these lie ``t2`` apart, and so on. There are ``number`` times UNIT elements. With a
    UNIT of 4 four neighbours always have one counter, which is found for the last of the four: see
    ``tiles.made_noise``.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    place = program * C + tl.arange(0, C)
    total = number * UNIT
    inside = place < total
    counted = tl.minimum(place | (UNIT - 1), total - 1)
    sample = counted // width
    rest = counted - sample * width
    run = rest // per
    where = first + (rest - run * per)
    outer = run // m1
    where += (run - outer * m1).to(tl.int64) * t1
    run = outer // m2
    where += (outer - run * m2).to(tl.int64) * t2
    outer = run // m3
    where += (run - outer * m3).to(tl.int64) * t3 + outer.to(tl.int64) * t4
    if SEED == "tensor":
        key = tl.load(seed)
    else:
        key = seed.to(tl.int64)
    if ids is not None:
        identity = tl.load(ids + sample)
    else:
        identity = sample.to(tl.int64) + sample_offset
    group = where >> 2
    of_group = stream.to(tl.uint32) ^ ((group >> 32) << 24).to(tl.uint32)
    if UNIT == 4:
        lane = place & 3
    else:
        lane = (where & 3).to(tl.int32)
    n = normals(key, of_group, identity, group, lane, 1.0, V == "fast", ASM, EMULATE)
    tl.store(out + place, narrow(n, out.dtype.element_ty, EMULATE), mask=inside)


def declines(call: NormalCall) -> str:
    """Why this backend does not support the call; empty if it does."""
    if call.window is not None and len(call.window.runs(call.shape[1:])[1]) > 1 + _OUTER:
        return "a slice of more than five dimensions"
    because = makes(call.seed, call.device) or ("" if call.packed is None else too_many(call.packed))
    return because or ("" if call.dtype in DATA else f"normals in {call.dtype}")


def run(call: NormalCall, backend: Backend) -> Tensor:
    """See ``NormalCall``."""
    where = device_of(call.device, call.seed)
    z = torch.empty(call.shape, dtype=call.dtype, device=where)
    if z.numel() and call.window is not None:
        windowed(where, *_windowed_launch(call, z))
    elif z.numel():
        n = Seeded(call.seed, call.stream, call.sample_offset, 0.0, call.rng)
        affine.run(tuple(call.shape), where, None, None, n, None, None, z, packed=call.packed)
    return z


def _windowed_launch(call: NormalCall, z: Tensor) -> tuple[tuple[int, int], tuple, tuple]:
    """The launch of ``windowed``: (grid, arguments, constants)."""
    place, sizes, strides = call.window.runs(z.shape[1:])
    (*outer, run), (*apart, _) = sizes, strides
    unit = 1 if any(number % 4 for number in (place, run, *apart)) else 4
    outer = (*reversed(outer), 1, 1, 1)[: _OUTER - 1]
    apart = (*reversed(apart), 0, 0, 0, 0)[:_OUTER]
    seed, kind = seed_of(call.seed, z.device)
    offset, ids = samples_on(z.device, call.sample_offset)
    total = z.numel()
    return (
        (triton.cdiv(total, _BLOCK), 1),
        (z, seed, ids, call.stream, offset, place, *apart, run, *outer, total // len(z), total // unit),
        (
            *(kind, call.rng, unit, _BLOCK, total + _BLOCK >= 2**31),
            *(launch.has_approximate_instructions(z.device), launch.INTERPRETED),
        ),
    )
