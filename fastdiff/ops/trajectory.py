"""A run of sampler steps. Rows are placed, and pointers and buffers found, before the first step; then a step is one
launch and little of the host's time. The launch writes x, the history entry and the next input of the network (scaled,
and twice for guidance).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.reference import Trajectory
from ..calls import RunCall
from ..philox import Philox
from . import dispatch
from .checks import check_clip, check_floating, place_rows
from .step import check_inpainting
from .step_table import PreparedSteps


def trajectory(
    x: Tensor,  # [B, ...]
    table: Tensor | PreparedSteps,  # [steps, K]
    *,
    guidance: Tensor | float = 1.0,  # [B], or another shape that place_rows takes
    clip: float | None = None,
    mask: Tensor | None = None,  # broadcasts to [B, ...]
    known: Tensor | None = None,  # [B, ...]
    known_noise: Tensor | Philox | None = None,  # [B, ...]
    philox: Philox | None = None,
    reuse: bool = False,
) -> Trajectory:
    """Prepare the steps of ``table`` from ``x`` on. A run has no gradients; ``fastdiff.ops.step`` has.

    Args:
        x: where to start, floating point, [batch, ...].
        table: rows of coefficients, [steps, K] with K = len(COLUMNS), float64 on the CPU; ``PreparedSteps`` of them
            where there are several runs of one table.
        guidance: of guided steps: a number, or rows ([batch]).
        clip, mask, known, known_noise: see ``fastdiff.ops.step``.
        philox: what the noise of steps is made from; each step names its stream.
        reuse: whether a step may write over its own x and over the input that the network was given (output buffers
            are used again). The x that is passed here is not written to.

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
    call = RunCall(x, prepared, guidance, clip, mask, known, known_noise, philox, reuse)
    return dispatch.get(x.device).trajectory(call)
