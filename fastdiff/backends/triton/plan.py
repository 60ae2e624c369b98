"""The tiling: how data is cut into runs that share a row (and a sample, where noise is made), and runs into tiles. Pure
numbers, computed once a shape; the tests draw the tiles out.

Short rows go several to a tile. A length that is a multiple of 8 is passed as its eighth, so the compiler knows the
alignment; other lengths are masked, and loaded by smaller vectors or none. Rows that fill no whole tiles, such as a
video's frames, are cut into finer ones where that leaves less unused. Tile sizes come from counts of instructions and
registers, not from timings; the counts predicted the rates that were measured later.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from ...calls import Packed
from ..layout import layout_of

# (elements from which on, elements a tile of 2-byte data, of 4-byte data), for four warps. Small data is cut finer, so
# that all multiprocessors have some of it; offsets of 64 bits take registers. From instruction and register counts.
TILES = (((1 << 31) - (1 << 13), 1024, 1024), (1 << 21, 4096, 4096), (0, 1024, 1024))


def tile_of(elements: int, itemsize: int) -> int:
    """Elements a tile. Part of the definition of a loss: the order of its sum depends on it."""
    for least, narrow, wide in TILES:
        if elements >= least:
            return narrow if itemsize <= 2 else wide
    raise AssertionError(elements)


class Plan(NamedTuple):
    """See ``tiles.py`` for the names. ``rows``: how many there are; ``parts``: programs with a share of a row."""

    grid: tuple[int, int]
    rows: int
    parts: int
    numbers: tuple[int, int, int, int, int, int]  # units, runs, blocks, per, frames, shared
    sample_runs: int
    channel_runs: int
    constants: tuple  # ROWS, R, C, UNIT, GRID, SAMPLES, EVEN, WIDE


@lru_cache(maxsize=1024)
def plan(
    shape: tuple[int, ...], rows: tuple[int, ...], tile: int, made: bool = False, channels: bool = False,
    sums: bool = False,
) -> Plan:  # fmt: skip
    """The tiling of data of ``shape``.

    Args:
        rows: the shape of the rows, as ``layout_of`` returns it.
        tile: elements a tile.
        made: a run stays within one sample: noise is made, which is counted by sample; or between samples lies more.
        channels: offset noise is made, which is counted by channel: a run stays within one channel.
        sums: rows are summed: a tile has several runs only if each run is a whole row.
    """
    elements = math.prod(shape)
    (outer, shared, frames, inner, samples, count), _ = layout_of(shape, rows)
    if frames * inner == 1:
        shared, inner = 1, shared
    width, sample = inner, elements // samples
    if made:
        width = min(width, sample)
    if channels:
        width = min(width, sample // count)
    runs, per = elements // width, inner // width
    # 8 elements of two bytes, or 4 of four, are a load of 128 bits.
    unit = next(unit for unit in (8, 4, 1) if width % unit == 0)
    # Less of a finer tile hangs over the end of a run; but a tile has its fixed part, like an eighth of a full one.
    c = min((min(tile, _power_of_2(width)) >> k or 1 for k in range(3)), key=lambda c: -(-width // c) * (c + tile // 8))
    blocks = -(-width // c)
    parts = per * shared * blocks
    r = 1 if sums and parts > 1 else min(max(1, tile // c), _power_of_2(runs)) if blocks == 1 else 1
    sample_runs = max(1, sample // width)
    kind = "one" if outer * frames == 1 else "run" if per == shared == frames == 1 else "layout"
    if blocks == 1:
        way, grid = "runs", (-(-runs // r), 1)
    elif runs < 1 << 16:
        way, grid = "blocks, runs", (blocks, runs)
    else:
        way, grid = "all", (blocks * runs, 1)
    return Plan(
        grid,
        outer * frames,
        parts,
        (width // unit, runs, blocks, per, frames, shared),
        sample_runs,
        max(1, sample // count // width),
        (
            *(kind, r, c, unit, way, "run" if sample_runs == 1 else "part"),
            *(width % c == 0 and runs % r == 0, elements + r * c >= 2**31),
        ),
    )


def plan_of_sequences(packed: Packed, shape: tuple[int, ...], tile: int) -> Plan:
    """The tiling of packed sequences: each is a run, a row and a sample, cut into tiles from its own start on."""
    elements, longest = math.prod(shape), int(packed.sizes.max())
    token = math.prod(shape[packed.dim + 1 :])
    unit = next(unit for unit in (8, 4, 1) if token % unit == 0)
    c = min(tile, max(unit, _power_of_2(longest)))
    blocks, rows = max(1, -(-longest // c)), packed.sequences
    wide = elements + c >= 2**31
    constants = "run", 1, c, unit, "packed", "run", False, wide
    return Plan((blocks, rows), rows, blocks, (0, rows, blocks, 1, 1, 1), 1, 1, constants)


@lru_cache(maxsize=1024)
def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]] | None:
    """(dimensions, three sizes and four strides, those of the last dimensions last) of a strided tensor, its dimensions
    merged where they can be; 0 dimensions if it is contiguous. None if more than four are left, or it reaches too far
    for numbers of 32 bits."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 4 or sum((size - 1) * stride for size, stride in merged) >= 2**31:
        return None
    dims = 0 if len(merged) < 2 and (not merged or merged[0][1] == 1) else len(merged)
    padded = [(1, 0)] * (4 - len(merged)) + merged
    return dims, (*(size for size, _ in padded[1:]), *(stride for _, stride in padded))


class Mask(NamedTuple):
    """A strided mask as the loss reads it.

    ``together``: "none", each element is found by divisions of its own; else ``unit`` elements of the last dimension
    share them, which are "neighbours" in memory, aligned, or lie "apart", by the last of the numbers.
    numbers: three sizes and four strides, those of the last dimension in such units, and a stride.
    """

    dims: int
    together: str
    numbers: tuple[int, int, int, int, int, int, int, int]


def mask_of(dims: int, numbers: tuple[int, ...], unit: int) -> Mask:
    """From what ``strided`` gives, for tiles that consist of units of ``unit`` elements."""
    first, second, last, *strides, step = numbers
    if dims == 0 or unit == 1 or last % unit:
        return Mask(dims, "none", (*numbers, 0))
    if step == 1 and not any(stride % unit for stride in strides):
        return Mask(dims, "neighbours", (first, second, last // unit, *(stride // unit for stride in strides), 1, 0))
    return Mask(dims, "apart", (first, second, last // unit, *strides, step * unit, step))


def divisor(size: int) -> tuple[int, int, int]:
    """(size, factor, shift) of a division of numbers below 2^31: n // size = (2 n factor >> 32) >> shift. The factor
    has 32 bits, in those of a signed number (Granlund and Montgomery 1994)."""
    shift = (size - 1).bit_length()
    factor = -(-(1 << (31 + shift)) // size)
    return size, factor - (1 << 32 if factor >= 1 << 31 else 0), shift


def order_of(name: str, shape: tuple[int, ...], how: Plan) -> tuple[tuple, tuple[str, int, int, int]]:
    """Where data of ``shape`` lies in memory, for ``tiles.spot_of``: the divisors of C, h and w, one behind the other,
    and the constants ORDER, PATCH_P, PATCH_Q and IN_ROW. ``name``: see ``layout.order_of_tokens``."""
    if name == "none":
        return (None,) * 9, ("none", 1, 1, 1)
    _, channels, high, p, wide, q = shape
    tile, unit = how.constants[2:4]
    in_row = math.gcd(unit, wide * q, tile)
    return (*divisor(channels), *divisor(high), *divisor(wide * q // in_row)), (name, p, q, in_row)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
