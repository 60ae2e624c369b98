"""A run of sampler steps, prepared before the first: one launch a step, and little of the host's time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.reference import Trajectory
from ..philox import Philox
from . import dispatch
from .checks import check_clip, check_floating, place_rows
from .prepared import PreparedSteps
from .step import check_inpainting


def trajectory(
    x: Tensor,
    table: Tensor | PreparedSteps,
    *,
    guidance: Tensor | float = 1.0,
    clip: float | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | Philox | None = None,
    philox: Philox | None = None,
    reuse: bool = False,
) -> Trajectory:
    """Prepare the steps of ``table`` from ``x`` on. (Without gradients: ``fastdiff.ops.step`` is differentiable.)

    Args:
        x: where to start, floating point, [batch, ...].
        table: rows of coefficients, [steps, K] with K = len(COLUMNS), float64 on the CPU; ``PreparedSteps`` of them
            where there are several runs of one table.
        guidance: of guided steps: a number, or rows ([batch]).
        clip, mask, known, known_noise: see ``fastdiff.ops.step``.
        philox: what the noise of steps is made from; each step names its stream.
        reuse: results may be written where earlier ones were: what x was before a step is then gone after it, and so
            is what the network was given. The x that is passed here is not written to.

    Raises TypeError or ValueError for unfit inputs.
    """
    check_floating(x=x)
    prepared = table if isinstance(table, PreparedSteps) else PreparedSteps(table)
    check_clip(clip)
    check_inpainting(x, mask, known, known_noise)
    if isinstance(guidance, Tensor):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        guidance = place_rows("guidance", guidance.to(x.device, dtype), x.shape)
    if known is not None:
        known = known.to(x.dtype)
    backend = dispatch.get(x.device)
    make = getattr(backend, "Trajectory", Trajectory)
    return make(backend.step, x, prepared, guidance, clip, mask, known, known_noise, philox, reuse)
