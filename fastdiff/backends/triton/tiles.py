"""What kernels have in common: how they go through their data. They read coefficients and know nothing of diffusion.

Data is runs of ``width`` = UNIT * units elements that share a row (and, where noise is made, a sample). A program does
a tile of R runs by C elements: part of one run (R = 1), or several short runs whole. What differs between calls is a
constexpr, so nothing that is not needed is compiled in; sizes that change are not.

The parameters that all kernels share:

    index, steps, stride    rows of coefficients that are gathered: entry index[row] of columns with ``stride``
    units, runs, blocks     the size of a run over UNIT, the number of runs, of tiles in a run
    per, frames, shared     runs in a stretch of one row, then rows that alternate, then how often they come again
    sample_runs             runs in a sample, for noise that is made
    *_KIND                  of a coefficient: "none", "one" number, "row", or "gathered"
    ROWS                    how runs map to rows: "one", "run" (each its own) or "layout"
    GRID                    "runs": a tile has whole runs; else "blocks, runs", or "all" in one dimension; "packed":
                            runs are sequences of different lengths, see ``place_packed``
    starts                  of packed sequences: the first element of each, and the number of elements
    SAMPLES                 a run is a sample ("run"), or part of one
    EVEN                    the tiles cover the runs exactly, so nothing is masked
    ORDER                   data [B, C, h, p, w, q] that lies in memory as packed tokens, [B, h, w, c p q] ("c p q") or
                            [B, h, w, p q c] ("p q c"); "none": in the order of its elements. See ``spot_of``
    PATCH_P, PATCH_Q        p and q; IN_ROW: neighbouring elements that surely are in one row of the image
    c_size, h_size, w_size  C, h, and the row w q over IN_ROW; *_factor, *_shift: to divide by them, see ``divided``
    WIDE                    offsets need 64 bits
    EMULATE, ASM            in the interpreter; on an NVIDIA GPU

What the compiler needs to be shown:

- The place of an element in its tile is known when a kernel is compiled. It is kept apart from where the tile starts,
  so an address is one register and a constant, and four neighbours are seen to share a counter of the noise.
- The last compiler moves the loads of a tile behind its noise, where registers are free. So the data is prefetched into
  the L2 cache first, 64 bytes an instruction: memory and arithmetic overlap also where all programs run at once.
- Noise is written for one element: four normals, of which it takes one. Where noise goes into two results its indices
  are tied to the layout of the data; left to itself, Triton lays them out one a thread, and each thread makes all four.
- Fast noise is made with its factor in the radius, so it costs one multiply-add an element in the sum it goes into.
- A mask that is broadcast is found by one division for the 8 (or 4) elements that lie together in it.
- The constant of smooth L1 and pseudo-Huber is inverted once a row, so no element is divided by it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import narrow, normals, widen


@triton.jit
def place_of(units, runs, blocks, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr,
             EVEN: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(run, block, start, place, whether it exists) of each element, which is number ``start`` + ``place`` of the data;
    a run that does not exist is the last. The place in the tile is apart: it is known when the kernel is compiled."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    if GRID == "runs":
        block = program * 0
        first = program * R
    elif GRID == "blocks, runs":
        block = program
        first = tl.program_id(1)
    else:
        block = program % blocks
        first = program // blocks
    if WIDE:
        first = first.to(tl.int64)
    width = units * UNIT
    place = tl.arange(0, C)
    if R == 1:
        run = first
        safe = run
        inside = block * C + place < width
    else:
        run = (first + tl.arange(0, R))[:, None]
        safe = tl.minimum(run, runs - 1)
        place = place[None, :]
        inside = (block * C + place < width) & (run < runs)
    return safe, block, run * units * UNIT + block * C, place, inside


@triton.jit
def place_packed(starts, C: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """``place_of`` where a run is a packed sequence, and how many units the sequence has. Each has as many programs as
    the longest needs: those that get no element of a shorter one are to end."""
    block = tl.program_id(0)
    run = tl.program_id(1)
    first = tl.load(starts + run)
    units = (tl.load(starts + run + 1) - first) // UNIT
    if WIDE:
        block = block.to(tl.int64)
        run = run.to(tl.int64)
    else:
        first = first.to(tl.int32)
        units = units.to(tl.int32)
    place = tl.arange(0, C)
    # Sequences are whole units, which the compiler is to see.
    return run, block, first // UNIT * UNIT + block * C, place, block * C + place < units * UNIT, units


@triton.jit
def halves_of(start, run, units, sample_runs, UNIT: tl.constexpr, SAMPLES: tl.constexpr):
    """Where the tile lies in a tensor whose samples are twice as long: ``start`` in their first and second halves."""
    half = sample_runs * units * UNIT
    if SAMPLES == "run":
        first = start + run * half
    else:
        first = start + run // sample_runs * half
    return first, first + half


@triton.jit
def divided(n, divisor):
    """n / size, rounded down: by a product with ``factor``, where n has 32 bits (see ``plan.divisor``)."""
    size, factor, shift = divisor
    if n.dtype == tl.uint32:
        return tl.umulhi(n * 2, n * 0 + factor.to(tl.uint32)) >> shift.to(tl.uint32)
    else:
        return n // size


@triton.jit
def spot_of(start, place, c_divisor, h_divisor, w_divisor, ORDER: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
            IN_ROW: tl.constexpr):  # fmt: skip
    """(start, place) in memory of the elements ``start`` + ``place`` of data [B, C, h, P, w, Q] that lies there as
    tokens. IN_ROW elements of a row of the image share the divisions by sizes that change."""
    if ORDER == "none":
        return start, place
    else:
        offset = start + place
        # Below 2^31 but where offsets have 64 bits; the division of unsigned numbers is the shorter one.
        n = offset if offset.dtype == tl.int64 else offset.to(tl.uint32)
        channels, high, wide = c_divisor[0].to(n.dtype), h_divisor[0].to(n.dtype), w_divisor[0].to(n.dtype)
        n = n // IN_ROW
        rows = divided(n, w_divisor)  # of elements
        x = (n - rows * wide) * IN_ROW + (place % IN_ROW).to(n.dtype)
        patches = rows // P  # rows of patches
        planes = divided(patches, h_divisor)  # channels of samples
        samples = divided(planes, c_divisor)
        token = (samples * high + (patches - planes * high)) * (wide * IN_ROW // Q) + x // Q
        c, p = planes - samples * channels, rows % P
        # Where those are whole patches, the compiler is to see which elements are neighbours.
        if IN_ROW % Q == 0:
            q = (place % Q).to(n.dtype)
        else:
            q = x % Q
        if ORDER == "c p q":
            at = ((token * channels + c) * P + p) * Q + q
        else:
            tl.static_assert(ORDER == "p q c")
            at = ((token * P + p) * Q + q) * channels + c
        return start * 0, at.to(offset.dtype)


@triton.jit
def row_of(run, per, frames, shared, ROWS: tl.constexpr):
    if ROWS == "one":
        return run * 0
    elif ROWS == "run":
        return run
    else:
        stretch = run // per
        return stretch // (frames * shared) * frames + stretch % frames


@triton.jit
def entry_of(index, row, steps, INDEX: tl.constexpr):
    """(entry of the columns, whether there is one)"""
    if INDEX == "none":
        return row, row == row
    else:
        if INDEX == "one":
            entry = tl.load(index + row * 0)
        else:
            entry = tl.load(index + row)
        inside = entry.to(tl.uint64) < steps.to(tl.uint64)  # a negative one is large
        return tl.where(inside, entry, 0).to(tl.int32), inside


@triton.jit
def coefficient(pointer, row, entry, found, stride, KIND: tl.constexpr):
    if KIND == "one":
        return tl.load(pointer + row * 0)
    elif KIND == "row":
        return tl.load(pointer + row)
    else:
        return tl.where(found, tl.load(pointer + entry * stride), float("nan"))


@triton.jit
def load(pointer, start, place, inside, EVEN: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
         EMULATE: tl.constexpr):  # fmt: skip
    if EVEN:
        return widen(tl.load(pointer + start + place), ASM and UNIT > 1, EMULATE)
    else:
        return widen(tl.load(pointer + start + place, mask=inside, other=0.0), ASM and UNIT > 1, EMULATE)


@triton.jit
def load_mask(mask, start, place, inside, sizes, strides, DIMS: tl.constexpr, TOGETHER: tl.constexpr,
              UNIT: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """The mask of each element: laid out as the data (DIMS = 0), or strided in up to four dimensions. TOGETHER: whether
    the elements of a unit share their divisions, and are neighbours in memory (see ``plan.Mask``)."""
    if DIMS == 0:
        pointer = mask + start + place
    else:
        offset = start + place
        # Sizes are below 2^31 but where offsets have 64 bits; the division of unsigned numbers is the shorter one.
        rest = offset if offset.dtype == tl.int64 else offset.to(tl.uint32)
        if TOGETHER != "none":
            rest = rest // UNIT
        at = rest * 0
        for k in tl.static_range(DIMS - 1):
            size = sizes[2 - k].to(rest.dtype)
            at += rest % size * strides[3 - k].to(rest.dtype)
            rest = rest // size
        at += rest * strides[4 - DIMS].to(rest.dtype)
        if TOGETHER == "apart":
            at = at + place % UNIT * strides[4].to(rest.dtype)
        pointer = mask + at.to(offset.dtype)
        if TOGETHER == "neighbours":
            pointer = mask + at.to(offset.dtype) * UNIT + place % UNIT
    if EVEN:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=inside, other=0).to(tl.float32)


@triton.jit
def store(pointer, start, place, value, inside, EVEN: tl.constexpr, EMULATE: tl.constexpr):
    stored = narrow(value, pointer.dtype.element_ty, EMULATE)
    if EVEN:
        tl.store(pointer + start + place, stored)
    else:
        tl.store(pointer + start + place, stored, mask=inside)


@triton.jit
def prefetch(pointer, start, block, units, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
             ASM: tl.constexpr):  # fmt: skip
    """Has the data of a tile on its way while its noise is made. The loads come first here too, but the last compiler
    puts them behind the noise, where there are registers for what they bring."""
    EACH: tl.constexpr = 512 // pointer.dtype.element_ty.primitive_bitwidth  # of 64 bytes
    if ASM and R == 1 and C >= 32 * EACH:
        place = tl.arange(0, C // EACH) * EACH
        if not EVEN:
            place = tl.minimum(place, units * UNIT - block * C - 1)
        address = (pointer + start + place).to(tl.uint64)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, False, 1)


@triton.jit
def laid_out(index, data, EMULATE: tl.constexpr):
    """``index``, with its elements where those of ``data`` are. Triton lays out what it makes of an index for its first
    use and moves it through shared memory for others, a thread having one element; and only a thread that has all four
    of a counter makes them together. The zero is one that the last compiler finds, not Triton."""
    if EMULATE:
        return index
    else:
        return index + ((data.to(tl.uint32, bitcast=True) >> 16) >> 16).to(index.dtype)


@triton.jit
def made_noise(seed, ids, stream, sample_offset, strength, factor, run, block, place, units, sample_runs, channel_runs,
               SEED: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, SAMPLES: tl.constexpr,
               FAST: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """Noise of a tile: Philox normals, plus ``strength`` times one normal a (sample, channel). FAST: times ``factor``,
    which costs nothing there. Samples count from ``sample_offset``, or have ``ids``."""
    if SEED == "tensor":
        key = tl.load(seed)
    else:
        key = seed.to(tl.int64)
    if SAMPLES == "run":
        sample, inner = run, run * 0
    else:
        sample, inner = run // sample_runs, run % sample_runs
    if ids is not None:
        sample = tl.load(ids + sample)
    else:
        sample = sample.to(tl.int64) + sample_offset
    if UNIT >= 4 and C >= 4:
        # Four neighbours in the tile are four of a counter. With the last of the four for all, the compiler sees that
        # they are the same.
        group = inner * units * (UNIT // 4) + block * (C // 4) + ((place | 3) >> 2)
        n = normals(key, stream, sample, group, place & 3, factor, FAST, ASM, EMULATE)
    else:
        index = inner * units * UNIT + block * C + place
        n = normals(key, stream, sample, index >> 2, index & 3, factor, FAST, ASM, EMULATE)
    if OFFSET:
        # Stream 1 is that of the channel offsets: see ops/noise.py.
        index = inner // channel_runs
        shift = normals(key, stream * 0 + 1, sample, index >> 2, index & 3, factor, FAST, ASM, EMULATE)
        n = n + strength * shift
    return n
