"""A run of sampler steps, prepared before the first: one launch a step, and little of the host's time."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.reference import COLUMNS, Trajectory
from .checks import check_clip, check_floating, place_rows
from .noise import Philox
from .step import check_inpainting


def trajectory(
    x: Tensor,
    table: Tensor,
    *,
    guidance: Tensor | float = 1.0,
    clip: float | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | Philox | None = None,
    reuse: bool = False,
) -> Trajectory:
    """Prepare the steps of ``table`` from ``x`` on.

    Args:
        x: where to start, floating point, [batch, ...].
        table: rows of coefficients, [steps, K] with K = len(COLUMNS), float64 on the CPU.
        guidance: of guided steps: a number, or rows ([batch]).
        clip, mask, known, known_noise: see ``fastdiff.ops.step``.
        reuse: results may be written where earlier ones were: what x was two steps ago is then gone.

    Raises TypeError or ValueError for unfit inputs.
    """
    check_floating(x=x, table=table)
    if table.ndim != 2 or table.shape[1] != len(COLUMNS):
        raise ValueError(f"table must be [steps, {len(COLUMNS)}]; got {tuple(table.shape)}.")
    check_clip(clip)
    check_inpainting(x, mask, known, known_noise)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    placed = table.to(x.device, dtype)
    if isinstance(guidance, Tensor):
        guidance = place_rows("guidance", guidance.to(x.device, dtype), x.shape)
    if known is not None:
        known = known.to(x.dtype)
    backend = backends.get(x.device)
    make = getattr(backend, "Trajectory", Trajectory)
    return make(backend.step, x, table, placed, guidance, clip, mask, known, known_noise, reuse)
