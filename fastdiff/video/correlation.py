"""Noise that the frames of a video share in part."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..names import find
from ..numeric import check_numbers
from ..ops.checks import check_floating, compute_dtype
from ..philox import Stream, seeded

KINDS = {"mixed": "mixed", "progressive": "progressive"}


def check_alpha(name: str, alpha: float) -> None:
    """Raise TypeError or ValueError unless ``alpha`` says how much frames share."""
    check_numbers(**{name: alpha})
    if not 0 <= alpha < math.inf:
        raise ValueError(f"{name} must be at least 0, and finite; got {alpha!r}.")


def frame_noise(
    x0: Tensor,
    kind: str = "mixed",
    alpha: float = 1.0,
    *,
    frame_dim: int = 2,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    sample_offset: int | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Noise that is correlated between frames, to be given to ``Objective.noise(x0, noise=)`` (Ge et al. 2023,
    "Preserve Your Own Correlation", arXiv 2305.10474, section 4.1).

    With z_f the noise of frame f by itself, and a = alpha / sqrt(1 + alpha^2), b = 1 / sqrt(1 + alpha^2):

    - "mixed": n_f = a s + b z_f, s one noise for all frames. The correlation of two frames is alpha^2 / (1 + alpha^2).
    - "progressive": n_0 = z_0, n_f = a n_{f - 1} + b z_f. That of frames f and g is a^abs(f - g).

    The variance is 1. alpha = 0 is plain noise, with the numbers of ``Objective.noise``.

    Args:
        x0: data [batch, channels, frames, ...], floating point, whose shape, device and dtype count.
        kind: "mixed" or "progressive".
        alpha: at least 0.
        frame_dim: which dimension the frames are: 2, or 1.
        generator, seed, sample_offset, ids: as in ``Objective.noise``: noise of a sample depends on (seed, its index or
            id) alone.

    Returns float32 (float64 for float64 data), shaped as x0. Raises TypeError or ValueError for unfit inputs.
    """
    check_floating(x0=x0)
    kind = find("kind of frame noise", kind, KINDS, {})
    check_alpha("alpha", alpha)
    if frame_dim not in (1, 2) or x0.ndim <= frame_dim:
        raise ValueError(
            f"frame_dim must be 2, for [batch, channels, frames, ...], or 1, for [batch, frames, ...]; got "
            f"{frame_dim!r} for {tuple(x0.shape)}."
        )
    seed, samples = seeded(seed, generator, ids, sample_offset, len(x0), x0.device)
    z = ops.materialize(ops.Philox(seed, samples), x0.shape, x0.device)
    shared, own = alpha / math.hypot(1, alpha), 1 / math.hypot(1, alpha)
    if kind == "mixed":
        shape = [*x0.shape[:frame_dim], 1, *x0.shape[frame_dim + 1 :]]
        s = ops.materialize(ops.Philox(seed, samples, Stream.FRAMES), shape, x0.device)
        z = own * z + shared * s
    elif alpha:
        frames = z.unbind(frame_dim)
        for before, frame in zip(frames, frames[1:]):
            frame.mul_(own).add_(before, alpha=shared)
    return z.to(compute_dtype(x0))
