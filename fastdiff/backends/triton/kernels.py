"""The kernels. They read rows of coefficients and know nothing of diffusion.

Data is runs of ``width`` = UNIT * units elements that share a row (and, where noise is made, a sample). A program does
a tile of R runs by C elements: part of one run (R = 1), or several short runs whole. What differs between calls is a
constexpr, so nothing that is not needed is compiled in; sizes that change are not.

The parameters that all kernels share:

    index, steps, stride    rows of coefficients that are gathered: entry index[row] of columns with ``stride``
    units, runs, blocks     the size of a run over UNIT, the number of runs, of tiles in a run
    per, frames, shared     runs in a stretch of one row, then rows that alternate, then how often they come again
    samples_runs            runs in a sample, for noise that is made
    *_KIND                  of a coefficient: "none", "one" number, "row", or "gathered"
    ROWS                    how runs map to rows: "one", "run" (each its own) or "layout"
    GRID                    "runs": a tile has whole runs; else "blocks, runs", or "all" in one dimension
    SAMPLES                 a run is a sample ("run"), or part of one
    EVEN                    the tiles cover the runs exactly, so nothing is masked
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

from ... import codes
from .functions import accurate_exp, derivative, error, reciprocal
from .pairs import pair_product, pair_quotient, pair_rest, pair_rounded, pair_sum
from .philox import narrow, normals, widen

# The columns of a table of steps. (Only a kernel may use such a number, not a function that kernels call: by Triton's
# hash, under which compiled kernels are found again, it would be another one according to which was compiled first.)
P_X, P_M, C_X, C_M, C_X0, C_H1, C_H2, C_H3, C_H4, C_NOISE, L_0, L_V, H_X, H_M, H_X0, K_X0, K_N, C_IN = (
    tl.constexpr(column) for column in range(len(codes.COLUMNS))
)


@triton.jit
def _place(units, runs, blocks, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr,
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
def _row(run, per, frames, shared, ROWS: tl.constexpr):
    if ROWS == "one":
        return run * 0
    elif ROWS == "run":
        return run
    else:
        stretch = run // per
        return stretch // (frames * shared) * frames + stretch % frames


@triton.jit
def _entry(index, row, steps, INDEX: tl.constexpr):
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
def _coefficient(pointer, row, entry, found, stride, KIND: tl.constexpr):
    if KIND == "one":
        return tl.load(pointer + row * 0)
    elif KIND == "row":
        return tl.load(pointer + row)
    else:
        return tl.where(found, tl.load(pointer + entry * stride), float("nan"))


@triton.jit
def _load(pointer, start, place, inside, EVEN: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
          EMULATE: tl.constexpr):  # fmt: skip
    if EVEN:
        return widen(tl.load(pointer + start + place), ASM and UNIT > 1, EMULATE)
    else:
        return widen(tl.load(pointer + start + place, mask=inside, other=0.0), ASM and UNIT > 1, EMULATE)


@triton.jit
def _store(pointer, start, place, value, inside, EVEN: tl.constexpr, EMULATE: tl.constexpr):
    stored = narrow(value, pointer.dtype.element_ty, EMULATE)
    if EVEN:
        tl.store(pointer + start + place, stored)
    else:
        tl.store(pointer + start + place, stored, mask=inside)


@triton.jit
def _prefetch(pointer, start, block, units, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
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
def _laid_out(index, data, EMULATE: tl.constexpr):
    """``index``, with its elements where those of ``data`` are. Triton lays out what it makes of an index for its first
    use and moves it through shared memory for others, a thread having one element; and only a thread that has all four
    of a counter makes them together. The zero is one that the last compiler finds, not Triton."""
    if EMULATE:
        return index
    else:
        return index + ((data.to(tl.uint32, bitcast=True) >> 16) >> 16).to(index.dtype)


@triton.jit
def _made(seed, stream, sample_offset, strength, factor, run, block, place, units, sample_runs, channel_runs,
          SEED: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, SAMPLES: tl.constexpr,
          FAST: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """Noise of a tile: Philox normals, plus ``strength`` times one normal a (sample, channel). FAST: times ``factor``,
    which costs nothing there."""
    if SEED == "tensor":
        key = tl.load(seed)
    else:
        key = seed.to(tl.int64)
    if SAMPLES == "run":
        sample, inner = run, run * 0
    else:
        sample, inner = run // sample_runs, run % sample_runs
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


@triton.jit
def affine(
    out, kept, target, u, v, xi, a, b, p, q, index, seed, xi_seed,
    stream, sample_offset, strength, xi_stream, xi_sample_offset, xi_strength, gamma,
    steps, stride, units, runs, blocks, per, frames, shared, sample_runs, channel_runs,
    A_KIND: tl.constexpr, B_KIND: tl.constexpr, P_KIND: tl.constexpr, Q_KIND: tl.constexpr, INDEX: tl.constexpr,
    V: tl.constexpr, SEED: tl.constexpr, OFFSET: tl.constexpr,
    XI: tl.constexpr, XI_SEED: tl.constexpr, XI_OFFSET: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr, SAMPLES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out = a u + b (v + gamma xi), kept = v, target = p u + q v. v and xi are tensors ("tensor"), or made ("exact",
    "fast") or "none".

    Products and sums are rounded one by one, as in the reference: the kernel is compiled without contraction, but for
    noise of the fast transform, which has not the reference's bits in any case.
    """
    run, block, start, place, inside = _place(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    if V != "none" and V != "tensor" and (A_KIND != "none" or P_KIND != "none"):
        _prefetch(u, start, block, units, R, C, UNIT, EVEN, ASM)
    row = _row(run, per, frames, shared, ROWS)
    entry, found = _entry(index, row, steps, INDEX)
    # Fast noise that is not needed itself is made with its factor in it.
    SCALED: tl.constexpr = V == "fast" and (XI == "fast" or XI == "none") and kept is None and target is None
    if out is not None and V != "none":
        scale = _coefficient(b, row, entry, found, stride, B_KIND)
    made = place
    if A_KIND != "none" or P_KIND != "none":
        data = _load(u, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        if out is not None and (kept is not None or target is not None):  # the noise is used twice
            made = _laid_out(place, data, EMULATE)
    if V == "tensor":
        n = _load(v, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    elif V != "none":
        n = _made(seed, stream, sample_offset, strength, scale if SCALED else 1.0, run, block, made, units, sample_runs,
                  channel_runs, SEED, OFFSET, C, UNIT, SAMPLES, V == "fast", ASM, EMULATE)  # fmt: skip
    if kept is not None:
        _store(kept, start, place, n, inside, EVEN, EMULATE)
    if target is not None:
        if P_KIND != "none":
            second = _coefficient(p, row, entry, found, stride, P_KIND) * data
        if Q_KIND != "none":
            term = _coefficient(q, row, entry, found, stride, Q_KIND) * n
            second = term if P_KIND == "none" else second + term
        _store(target, start, place, second, inside, EVEN, EMULATE)
    if out is not None:
        if V != "none":
            if XI == "tensor":
                n = n + gamma * _load(xi, start, place, inside, EVEN, UNIT, ASM, EMULATE)
            elif XI != "none":
                n = n + gamma * _made(
                    xi_seed, xi_stream, xi_sample_offset, xi_strength, scale if SCALED else 1.0, run, block, made,
                    units, sample_runs, channel_runs, XI_SEED, XI_OFFSET, C, UNIT, SAMPLES, XI == "fast", ASM, EMULATE
                )  # fmt: skip
            value = n if SCALED else scale * n
        if A_KIND != "none":
            first = _coefficient(a, row, entry, found, stride, A_KIND) * data
            value = first if V == "none" else first + value
        _store(out, start, place, value, inside, EVEN, EMULATE)


@triton.jit
def _mask(mask, start, place, inside, sizes, strides, DIMS: tl.constexpr, TOGETHER: tl.constexpr, UNIT: tl.constexpr,
          EVEN: tl.constexpr):  # fmt: skip
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
def _total(values, count, apart, LANES: tl.constexpr):
    """The sum of ``count`` pairs of memory, in one fixed order. The second of a pair is ``apart`` from the first."""
    lanes = tl.arange(0, LANES)
    high = tl.zeros([LANES], tl.float32)
    low = tl.zeros([LANES], tl.float32)
    for start in range(0, count, LANES):
        k = start + lanes
        # Written by other programs: not to be found in this multiprocessor's own cache.
        more = tl.load(values + k, mask=k < count, other=0.0, cache_modifier=".cg")
        less = tl.load(values + apart + k, mask=k < count, other=0.0, cache_modifier=".cg")
        high, low = pair_sum(high, low, more, less)
    return tl.reduce((high, low), 0, pair_sum)


@triton.jit
def _last(counter, number):
    """Whether this is the last of ``number`` programs to come here. Then it sees all that the others have stored, and
    the counter is as it was."""
    # The barrier puts the stores of all threads before the release, which is one thread's.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == number - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _store_pair(pointer, apart, high, low, inside):
    tl.store(pointer, high, mask=inside)
    tl.store(pointer + apart, low, mask=inside)


@triton.jit
def _finish(row, inside, total, total_low, count, count_low, weight, result, means, divisor, counter, partials, number,
            place, rows, size, size_low, mean, NORMALIZATION: tl.constexpr, REDUCTION: tl.constexpr, R: tl.constexpr,
            LANES: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """From the sums of whole rows (one, or R) to the results; the last program makes those of all rows. Numbers are
    pairs, so that what is stored is rounded once."""
    if NORMALIZATION == "row":
        # A row with nothing in its mask has no mean, and is left out of that of the rows.
        counts = tl.where(count == 0, 0.0, 1.0)
        count = tl.where(count == 0, 1.0, count)
        tl.store(divisor + row, tl.div_rn(1.0, count), mask=inside)
        total, total_low = pair_quotient(total, total_low, count, count_low, EMULATE)
        count, count_low = counts, counts * 0.0
    elif NORMALIZATION == "none":
        total, total_low = pair_quotient(total, total_low, size, size_low, EMULATE)
    if means is not None:
        _store_pair(means + row, rows, total, pair_rest(total, total_low), inside)
    value, low = pair_product(total, total_low, weight, EMULATE)
    value, low = tl.where(weight == 0, 0.0, value), tl.where(weight == 0, 0.0, low)  # left out, whatever it holds
    if NORMALIZATION == "global":
        _store_pair(partials + 4 * number + row, rows, value, low, inside)
    elif REDUCTION == "none":
        tl.store(result + row, pair_rounded(value, low), mask=inside)
    if REDUCTION != "none" or NORMALIZATION == "global":
        if R > 1:
            there = inside & (value == value)  # so that what is left out of the low parts' sum is no NaN
            value, low = tl.reduce((tl.where(inside, value, 0.0), tl.where(there, low, 0.0)), 0, pair_sum)
            count, count_low = tl.sum(tl.where(inside, count, 0.0)), tl.sum(tl.where(inside, count_low, 0.0))
        _store_pair(partials + place, number, value, low, True)
        if NORMALIZATION != "none":
            _store_pair(partials + 2 * number + place, number, count, count_low, True)
        if _last(counter, number):
            value, low = _total(partials, number, number, LANES)
            if NORMALIZATION != "none":
                count, count_low = _total(partials + 2 * number, number, number, LANES)
            averaged = rows.to(tl.float32)
            if NORMALIZATION == "row":
                averaged = tl.where(count == 0, 1.0, count)
                tl.store(divisor + rows, tl.div_rn(1.0, averaged))
            if NORMALIZATION == "global":
                # A row's divisor is the mask's sum over the number of rows.
                count, count_low = pair_quotient(count, count_low, averaged, 0.0, EMULATE)
                count = tl.where(count == 0, 1.0, count)
                tl.store(divisor, tl.div_rn(mean, count))
                if REDUCTION == "none" or means is not None:
                    for start in range(0, rows, LANES):
                        k = start + tl.arange(0, LANES)
                        if means is not None:
                            first = tl.load(means + k, mask=k < rows, cache_modifier=".cg")
                            second = tl.load(means + rows + k, mask=k < rows, cache_modifier=".cg")
                            first, second = pair_quotient(first, second, count, count_low, EMULATE)
                            _store_pair(means + k, rows, first, pair_rest(first, second), k < rows)
                        if REDUCTION == "none":
                            first = tl.load(partials + 4 * number + k, mask=k < rows, cache_modifier=".cg")
                            second = tl.load(partials + 4 * number + rows + k, mask=k < rows, cache_modifier=".cg")
                            first, second = pair_quotient(first, second, count, count_low, EMULATE)
                            tl.store(result + k, pair_rounded(first, second), mask=k < rows)
                value, low = pair_quotient(value, low, count, count_low, EMULATE)
            if REDUCTION == "mean":
                value, low = pair_quotient(value, low, averaged, 0.0, EMULATE)
            if REDUCTION != "none":
                tl.store(result, pair_rounded(value, low))


@triton.jit
def _tile_sum(value, PAIRS: tl.constexpr, R: tl.constexpr, EMULATE: tl.constexpr):
    """The sum of each run of a tile, as a pair."""
    if not PAIRS:
        total = tl.sum(value, 1 if R > 1 else 0)
        return total, total * 0.0
    elif EMULATE:  # by the interpreter's own sum: a reduction by pairs is one Python call an element there
        wide = tl.sum(value.to(tl.float64), 1 if R > 1 else 0)
        high = wide.to(tl.float32)
        return high, tl.where(high - high == 0, wide - high.to(tl.float64), 0.0).to(tl.float32)
    else:
        return tl.reduce((value, value * 0.0), 1 if R > 1 else 0, pair_sum)


@triton.jit
def loss(
    prediction, x0, n, gradient, mask, p, q, scale, weight, c, index, seed,
    upstream, used, assumed, result, means, divisor, counters, partials,
    stream, sample_offset, strength, size, size_low, mean, both,
    m1, m2, m3, s0, s1, s2, s3, s4, rows, parts, number,
    steps, stride, units, runs, blocks, per, frames, shared, sample_runs, channel_runs,
    P_KIND: tl.constexpr, Q_KIND: tl.constexpr, SCALE_KIND: tl.constexpr, WEIGHT_KIND: tl.constexpr,
    C_KIND: tl.constexpr, UPSTREAM: tl.constexpr, INDEX: tl.constexpr,
    N: tl.constexpr, SEED: tl.constexpr, OFFSET: tl.constexpr, MASK_DIMS: tl.constexpr,
    TOGETHER: tl.constexpr,
    FUNCTION: tl.constexpr, NORMALIZATION: tl.constexpr, REDUCTION: tl.constexpr, LANES: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, GRID: tl.constexpr, SAMPLES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """weight mask rho(scale (prediction - p x0 - q n); c). Writes the sums if there is a ``result``, and the gradient
    by the prediction if there is a ``gradient``.

    In a forward pass the upstream gradient is not known yet: the gradient is made for ``assumed``, which is noted in
    ``used``. In a backward pass it is made for ``upstream``. If a forward pass wrote a gradient and ``upstream`` equals
    ``used``, that gradient is right, and nothing is done.

    Args:
        number: how many sums the last stage adds up.
        size, size_low: how many elements a row has, as a pair of float32; 1 for reduction "sum".
        mean: 1 / (the number of rows) for reduction "mean", otherwise 1.
        both: mean / size.
        divisor: where the mask's sum divides, the factor of the gradients: one number ("global"); or one a row, and
            after them 1 / (the number of rows with something in the mask) ("row").

    A row is whole in a program, or SPLIT over ``parts`` programs. The last of them to end adds their sums up, always in
    the same order.

    An element under a mask of 0, and a row of weight 0, add 0, whatever they hold.
    """
    if UPSTREAM != "none" and used is not None:
        came = tl.load(upstream)
        if came == tl.load(used):
            return
        tl.store(assumed, came, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))

    run, block, start, place, inside = _place(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    if N != "none" and N != "tensor":
        _prefetch(prediction, start, block, units, R, C, UNIT, EVEN, ASM)
        if P_KIND != "none":
            _prefetch(x0, start, block, units, R, C, UNIT, EVEN, ASM)
    row = _row(run, per, frames, shared, ROWS)
    entry, found = _entry(index, row, steps, INDEX)
    e = _load(prediction, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if N != "none":
        q_row = _coefficient(q, row, entry, found, stride, Q_KIND)
    if N == "tensor":
        made = _load(n, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    elif N != "none":
        made = _made(seed, stream, sample_offset, strength, q_row, run, block, place, units, sample_runs, channel_runs,
                     SEED, OFFSET, C, UNIT, SAMPLES, N == "fast", ASM, EMULATE)  # fmt: skip
    if N == "fast":  # the product is in it, and is taken into the difference
        e = e - made
    if P_KIND != "none":
        p_row = _coefficient(p, row, entry, found, stride, P_KIND)
        data = _load(x0, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        if N == "tensor" or N == "exact":
            e = e - tl.fma(p_row, data, q_row * made)
        else:
            e = tl.fma(-p_row, data, e)
    elif N == "tensor" or N == "exact":
        e = tl.fma(-q_row, made, e)
    if SCALE_KIND != "none":
        factor = _coefficient(scale, row, entry, found, stride, SCALE_KIND)
        e = factor * e
    constant, inverse = 1.0, 1.0
    if C_KIND != "none":
        constant = _coefficient(c, row, entry, found, stride, C_KIND)
        inverse = reciprocal(constant)
    if MASK_DIMS >= 0:
        kept = _mask(mask, start, place, inside, (m1, m2, m3), (s0, s1, s2, s3, s4), MASK_DIMS, TOGETHER, UNIT, EVEN)
    if WEIGHT_KIND != "none":
        strong = _coefficient(weight, row, entry, found, stride, WEIGHT_KIND)

    if gradient is not None:
        if UPSTREAM != "none":
            outer = _coefficient(upstream, row, entry, found, stride, UPSTREAM)
        else:
            outer = tl.load(assumed)
            outer = tl.where(outer == 0, 1.0, outer)  # 0: nothing has come yet
            tl.store(used, outer, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
        if NORMALIZATION == "row":
            k = strong * outer * tl.load(divisor + row)
            if REDUCTION == "mean":
                k = k * tl.load(divisor + rows)
        elif NORMALIZATION == "global":
            k = strong * outer * tl.load(divisor)
        else:
            k = strong * outer * both
        if SCALE_KIND != "none":
            k = k * factor
        if FUNCTION == "mse":
            slope = (2.0 * k) * e
        else:
            slope = k * derivative(e, inverse, FUNCTION, ASM)
        if MASK_DIMS >= 0:
            slope = tl.where(kept == 0, 0.0, slope * kept)
        # Of a row that is left out zeros are stored in place of the slope: that is a predicate, not one more
        # instruction an element.
        weights = tl.broadcast_to(strong, slope.shape)
        learns, left_out = weights != 0, weights == 0
        if not EVEN:
            learns, left_out = inside & learns, inside & left_out
        _store(gradient, start, place, slope, learns, False, EMULATE)
        _store(gradient, start, place, tl.zeros_like(slope), left_out, False, EMULATE)

    if result is not None:
        value = error(e, constant, inverse, FUNCTION, ASM)
        if MASK_DIMS >= 0:
            value = tl.where(kept == 0, 0.0, value * kept)
        if not EVEN:
            value = tl.where(inside, value, 0.0)
        if R > 1:
            whole = tl.program_id(0) * R + tl.arange(0, R)
            there = whole < runs
            row = tl.minimum(whole, runs - 1)
            row = _row(row, per, frames, shared, ROWS)
            entry, found = _entry(index, row, steps, INDEX)
            strong = _coefficient(weight, row, entry, found, stride, WEIGHT_KIND)
        else:
            there = row >= 0
        # Tiles are added up in pairs. Within one a plain sum will do: its roundings are many and independent, and those
        # of a thread 1/100 of the whole. Not so for the quotient of two sums.
        total, total_low = _tile_sum(value, NORMALIZATION != "none", R, EMULATE)
        count, count_low = total * 0.0, total_low
        if NORMALIZATION != "none":
            if not EVEN:
                kept = tl.where(inside, kept, 0.0)
            # Of bytes a plain sum is exact: a tile has at most 2^12.
            BYTES: tl.constexpr = mask.dtype.element_ty.primitive_bitwidth == 8
            count, count_low = _tile_sum(kept, not BYTES, R, EMULATE)
        place = tl.program_id(0)
        if SPLIT:
            if ROWS == "run":
                part = row * parts + block
            else:
                stretch = run // per
                part = row * parts + (stretch // frames % shared * per + run % per) * blocks + block
            everything = rows * parts
            _store_pair(partials + part, everything, total, total_low, there)
            if NORMALIZATION != "none":
                _store_pair(partials + 2 * everything + part, everything, count, count_low, there)
            if _last(counters + 1 + row, parts):
                total, total_low = _total(partials + row * parts, parts, everything, LANES)
                if NORMALIZATION != "none":
                    count, count_low = _total(partials + 2 * everything + row * parts, parts, everything, LANES)
                _finish(row, there, total, total_low, count, count_low, strong, result, means, divisor, counters,
                        partials + 4 * everything, number, row, rows, size, size_low, mean,
                        NORMALIZATION, REDUCTION, R, LANES, EMULATE)  # fmt: skip
        else:
            _finish(row, there, total, total_low, count, count_low, strong, result, means, divisor, counters,
                    partials, number, place, rows, size, size_low, mean,
                    NORMALIZATION, REDUCTION, R, LANES, EMULATE)  # fmt: skip


@triton.jit
def step(
    y, x0_out, entry, seen, x, m, uncond, h1, h2, h3, h4, v, log_variance, table, scale, seed,
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
    run, block, start, place, inside = _place(units, runs, blocks, R, C, UNIT, GRID, EVEN, WIDE)
    row = _row(run, per, frames, shared, ROWS)
    at = table + row * width
    if V != "none" and V != "tensor":
        _prefetch(x, start, block, units, R, C, UNIT, EVEN, ASM)
        _prefetch(m, start, block, units, R, C, UNIT, EVEN, ASM)
    state = _load(x, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    model = _load(m, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if GUIDED != "none":
        free = _load(uncond, start, place, inside, EVEN, UNIT, ASM, EMULATE)
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
        value = value + tl.load(at + C_H1) * _load(h1, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if h2 is not None:
        value = value + tl.load(at + C_H2) * _load(h2, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if h3 is not None:
        value = value + tl.load(at + C_H3) * _load(h3, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if h4 is not None:
        value = value + tl.load(at + C_H4) * _load(h4, start, place, inside, EVEN, UNIT, ASM, EMULATE)
    if V != "none":
        if V == "tensor":
            z = _load(v, start, place, inside, EVEN, UNIT, ASM, EMULATE)
        else:
            z = _made(seed, stream, sample_offset, strength, 1.0, run, block, place, units, sample_runs, channel_runs,
                      SEED, OFFSET, C, UNIT, SAMPLES, V == "fast", ASM, EMULATE)  # fmt: skip
        strong = tl.load(at + C_NOISE)
        if log_variance is not None:
            learned = _load(log_variance, start, place, inside, EVEN, UNIT, ASM, EMULATE)
            strong = strong * accurate_exp(0.5 * (tl.load(at + L_0) + tl.load(at + L_V) * learned))
        value = value + strong * z
    _store(y, start, place, value, inside, EVEN, EMULATE)
    if x0_out is not None:
        _store(x0_out, start, place, data, inside, EVEN, EMULATE)
    if entry is not None:
        kept = tl.load(at + H_X) * state + tl.load(at + H_M) * model + tl.load(at + H_X0) * data
        _store(entry, start, place, kept, inside, EVEN, EMULATE)
    if seen is not None:
        ahead = tl.load(at + C_IN) * value
        _store(seen, start, place, ahead, inside, EVEN, EMULATE)
        if TWICE:
            _store(seen + total, start, place, ahead, inside, EVEN, EMULATE)
