"""How the loss's kernel sums: tiles, rows, and all rows, in one fixed order, in pairs of float32."""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import pair_product, pair_quotient, pair_rest, pair_rounded, pair_sum
from .tiles import row_of


@triton.jit
def total_of(values, count, apart, LANES: tl.constexpr):
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
def is_last(counter, number):
    """Whether this is the last of ``number`` programs to come here. Then it sees all that the others have stored, and
    the counter is as it was."""
    # The barrier puts the stores of all threads before the release, which is one thread's.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == number - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def store_pair(pointer, apart, high, low, inside):
    tl.store(pointer, high, mask=inside)
    tl.store(pointer + apart, low, mask=inside)


@triton.jit
def finish(row, inside, total, total_low, count, count_low, weight, result, means, divisor, counter, partials, number,
           place, rows, averaged, size, size_low, mean, NORMALIZATION: tl.constexpr, REDUCTION: tl.constexpr,
           R: tl.constexpr, LANES: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """From the sums of whole rows (one, or R) to the results; the last program makes those of all rows. Numbers are
    pairs, so that what is stored is rounded once. ``averaged``: how many rows a mean is over, but for "row"."""
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
        store_pair(means + row, rows, total, pair_rest(total, total_low), inside)
    value, low = pair_product(total, total_low, weight, EMULATE)
    value, low = tl.where(weight == 0, 0.0, value), tl.where(weight == 0, 0.0, low)  # left out, whatever it holds
    if NORMALIZATION == "global":
        store_pair(partials + 4 * number + row, rows, value, low, inside)
    elif REDUCTION == "none":
        tl.store(result + row, pair_rounded(value, low), mask=inside)
    if REDUCTION != "none" or NORMALIZATION == "global":
        if R > 1:
            there = inside & (value == value)  # so that what is left out of the low parts' sum is no NaN
            value, low = tl.reduce((tl.where(inside, value, 0.0), tl.where(there, low, 0.0)), 0, pair_sum)
            count, count_low = tl.sum(tl.where(inside, count, 0.0)), tl.sum(tl.where(inside, count_low, 0.0))
        store_pair(partials + place, number, value, low, True)
        if NORMALIZATION != "none":
            store_pair(partials + 2 * number + place, number, count, count_low, True)
        if is_last(counter, number):
            value, low = total_of(partials, number, number, LANES)
            if NORMALIZATION != "none":
                count, count_low = total_of(partials + 2 * number, number, number, LANES)
            over = averaged.to(tl.float32)
            if NORMALIZATION == "row":
                over = tl.where(count == 0, 1.0, count)
                tl.store(divisor + rows, tl.div_rn(1.0, over))
            if NORMALIZATION == "global":
                # A row's divisor is the mask's sum over the number of rows.
                count, count_low = pair_quotient(count, count_low, over, 0.0, EMULATE)
                count = tl.where(count == 0, 1.0, count)
                tl.store(divisor, tl.div_rn(mean, count))
                if REDUCTION == "none" or means is not None:
                    for start in range(0, rows, LANES):
                        k = start + tl.arange(0, LANES)
                        if means is not None:
                            first = tl.load(means + k, mask=k < rows, cache_modifier=".cg")
                            second = tl.load(means + rows + k, mask=k < rows, cache_modifier=".cg")
                            first, second = pair_quotient(first, second, count, count_low, EMULATE)
                            store_pair(means + k, rows, first, pair_rest(first, second), k < rows)
                        if REDUCTION == "none":
                            first = tl.load(partials + 4 * number + k, mask=k < rows, cache_modifier=".cg")
                            second = tl.load(partials + 4 * number + rows + k, mask=k < rows, cache_modifier=".cg")
                            first, second = pair_quotient(first, second, count, count_low, EMULATE)
                            tl.store(result + k, pair_rounded(first, second), mask=k < rows)
                value, low = pair_quotient(value, low, count, count_low, EMULATE)
            if REDUCTION == "mean":
                value, low = pair_quotient(value, low, over, 0.0, EMULATE)
            if REDUCTION != "none":
                tl.store(result, pair_rounded(value, low))


@triton.jit
def tile_sum(value, PAIRS: tl.constexpr, R: tl.constexpr, EMULATE: tl.constexpr):
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
def reduce_terms(value, run, block, result, counters, partials, number, rows, parts, runs, blocks, per, frames, shared,
                 size, size_low, mean, REDUCTION: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr,
                 ROWS: tl.constexpr, R: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """From the terms of a tile, weights among them, to the result of a loss without a mask. What is outside is 0."""
    if R > 1:
        whole = tl.program_id(0) * R + tl.arange(0, R)
        there = whole < runs
        row = row_of(tl.minimum(whole, runs - 1), per, frames, shared, ROWS)
    else:
        row = row_of(run, per, frames, shared, ROWS)
        there = row >= 0
    total, total_low = tile_sum(value, False, R, EMULATE)
    count, count_low = total * 0.0, total_low
    one = tl.where(there, 1.0, 1.0)  # the weights are in the terms
    place = tl.program_id(0)
    if SPLIT:
        if ROWS == "run":
            part = row * parts + block
        else:
            stretch = run // per
            part = row * parts + (stretch // frames % shared * per + run % per) * blocks + block
        everything = rows * parts
        store_pair(partials + part, everything, total, total_low, there)
        if is_last(counters + 1 + row, parts):
            total, total_low = total_of(partials + row * parts, parts, everything, LANES)
            finish(row, there, total, total_low, count, count_low, one, result, None, None, counters,
                    partials + 4 * everything, number, row, rows, rows, size, size_low, mean,
                    "none", REDUCTION, R, LANES, EMULATE)  # fmt: skip
    else:
        finish(row, there, total, total_low, count, count_low, one, result, None, None, counters,
                partials, number, place, rows, rows, size, size_low, mean,
                "none", REDUCTION, R, LANES, EMULATE)  # fmt: skip
