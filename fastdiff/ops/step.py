"""The sampler step: guidance, x0, clamp, linear multistep update and noise in one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import backends
from ..backends.reference import COLUMNS
from .checks import check_alike, check_clip, check_floating, compute_dtype, place_rows
from .noise import Philox, check_noise


def step(
    x: Tensor,
    m: Tensor,
    row: Tensor,
    *,
    uncond: Tensor | None = None,
    guidance: Tensor | float = 1.0,
    clip: float | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | Philox | None = None,
    log_variance: Tensor | None = None,
    return_x0: bool = True,
    return_entry: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One step of any linear sampler.

    Args:
        x: the sample x_t, floating point, [batch, ...].
        m: the model's output, shaped as x.
        row: the coefficients of this step, [K] or one row a sample [batch, K], K = len(COLUMNS), in that order.
        uncond: the unconditional output, for classifier-free guidance m_uncond + guidance (m - m_uncond).
        guidance: the guidance scale: a number, or rows.
        clip: clamp the x0 estimate to [-clip, clip].
        history: up to four tensors kept from earlier steps, the latest first.
        noise: z, shaped as x, or a ``Philox`` to make it from; None adds none, whatever c_noise.
        log_variance: v, for a learned variance: the noise is scaled by exp((l_0 + l_v v) / 2) too.
        return_x0, return_entry: what is not wanted is None in the result, and not written.

    Returns:
        (y, x0 estimate, history entry): y and x0 in the dtype of x, the entry in float32 (float64 for float64).

    Raises TypeError or ValueError for unfit inputs.
    """
    check_floating(x=x, model_output=m, row=row)
    tensors = {"uncond": uncond, "log_variance": log_variance}
    tensors |= {f"history[{j}]": entry for j, entry in enumerate(history)}
    check_floating(**{name: tensor for name, tensor in tensors.items() if tensor is not None})
    check_alike(x=x, model_output=m, **tensors)
    check_noise(x=x, noise=noise)
    if len(history) > 4:
        raise ValueError(f"at most 4 history tensors are used; got {len(history)}.")
    check_clip(clip)
    batches = () if row.ndim == 1 else x.shape[:1]
    if row.shape != (*batches, len(COLUMNS)):
        raise ValueError(f"row must be [{len(COLUMNS)}] or [batch, {len(COLUMNS)}]; got {tuple(row.shape)}.")
    dtype = compute_dtype(x, m)
    row = row.to(x.device, dtype)
    if isinstance(guidance, Tensor):
        guidance = place_rows("guidance", guidance.to(x.device, dtype), x.shape)
    wanted = (return_x0, return_entry)
    return backends.get(x.device).step(
        x, m, uncond, guidance, row, clip, tuple(history), noise, log_variance, x.dtype, wanted
    )
