"""Noise of several resolutions, to be given to ``Objective.noise`` as its noise."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from . import ops
from .modes import lasting
from .numeric import check_numbers
from .ops.checks import check_floating, compute_dtype
from .philox import Stream, seeded


def pyramid_noise(
    x0: Tensor,
    discount: float = 0.4,
    levels: int = 6,
    ratio: float = 3.0,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sample_offset: int | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Multi-resolution (pyramid) noise, to be given to ``Objective.noise(x0, noise=)`` (Whitaker 2023,
    "Multi-Resolution Noise for Diffusion Model Training").

    n = (z + sum over i = 0, 1, ... of discount^i up(z_i)) / s: z and z_i standard normal, z_i smaller by ratio^i in the
    last two dimensions and at least 1, ``up`` bilinear, and s such that the mean of n^2 over the pixels is 1 in
    expectation. (Other recipes divide by the standard deviation of the batch that came out, so that a sample depends on
    its batch. They draw the ratio from [2, 4): pass ``random.uniform(2, 4)``.)

    Args:
        x0: data [batch, channels, ..., height, width], floating point, whose shape, device and dtype count. The frames
            of a video get noise of their own.
        discount: 0 is plain noise, 1 as much of each resolution; in [0, 1].
        levels: how many, the full size among them; it ends where a side is 1. At least 1.
        ratio: of the sizes of neighbouring levels, > 1.
        generator, seed, sample_offset, ids: as in ``Objective.noise``: noise of a sample depends on (seed, its index or
            id) alone.

    Returns float32 (float64 for float64 data), shaped as x0. Raises TypeError or ValueError for unfit inputs.
    """
    check_floating(x0=x0)
    check_numbers(discount=discount, levels=levels, ratio=ratio)
    if x0.ndim < 4:
        raise ValueError(f"pyramid noise is of [batch, channels, ..., height, width]; got {tuple(x0.shape)}.")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must lie in [0, 1]; got {discount!r}.")
    if levels < 1 or levels != int(levels):
        raise ValueError(f"levels must be a whole number of at least 1; got {levels!r}.")
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio must be a number above 1; got {ratio!r}.")
    seed, samples = seeded(seed, generator, ids, sample_offset, len(x0), x0.device)
    height, width = x0.shape[-2:]
    sizes: list[tuple[int, int]] = []
    while len(sizes) < levels - 1 and (not sizes or 1 not in sizes[-1]) and 1 not in (height, width):
        shrunk = ratio ** (len(sizes) + 1)
        sizes.append((max(1, int(height / shrunk)), max(1, int(width / shrunk))))
    z = ops.materialize(ops.Philox(seed, samples), x0.shape, x0.device)
    shared = math.prod(x0.shape[1:-2])
    coarse = [len(x0), shared * sum(h * w for h, w in sizes)]
    coarse = ops.materialize(ops.Philox(seed, samples, Stream.PYRAMID), coarse, x0.device)
    # z and the first level, z_0, are both of full size: their sum is root 2 times one.
    parts, variance = [], 2.0
    for i, ((h, w), each) in enumerate(zip(sizes, coarse.split([shared * h * w for h, w in sizes], 1)), 1):
        up = torch.nn.functional.interpolate(each.reshape(len(x0), shared, h, w), (height, width), mode="bilinear")
        parts.append((float(discount) ** i, up.reshape(x0.shape)))
        variance += float(discount) ** (2 * i) * _kept_variance(h, height) * _kept_variance(w, width)
    noise = z * (math.sqrt(2) / math.sqrt(variance))
    for factor, up in parts:
        noise = noise + factor / math.sqrt(variance) * up
    return noise.to(compute_dtype(x0))


@lru_cache(maxsize=256)
def _kept_variance(small: int, large: int) -> float:
    """The variance, averaged over places, of unit noise [small] that is linearly interpolated to [large]."""
    with lasting():
        unit = torch.eye(small, dtype=torch.float64, device="cpu").unsqueeze(0)
        return float(torch.nn.functional.interpolate(unit, large, mode="linear").square().sum() / large)
