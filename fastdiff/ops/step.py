"""The sampler step: guidance, x0 estimate, clamp, linear multistep update and noise in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..calls import StepCall
from ..codes import COLUMNS, KEPT_STEPS
from ..philox import Philox
from . import dispatch
from .checks import check_alike, check_clip, check_floating, compute_dtype, place_rows
from .noise import check_noise


def step(
    x: Tensor,  # [B, ...]
    m: Tensor,  # [B, ...]
    row: Tensor,  # [K] or [B, K]
    *,
    uncond: Tensor | None = None,  # [B, ...]
    guidance: Tensor | float = 1.0,  # [B], or another shape that place_rows takes
    clip: float | None = None,
    history: Sequence[Tensor] = (),  # [B, ...] each
    noise: Tensor | Philox | None = None,  # [B, ...]
    log_variance: Tensor | None = None,  # [B, ...]
    threshold: Tensor | None = None,  # [B], or as guidance
    mask: Tensor | None = None,  # broadcasts to [B, ...]
    known: Tensor | None = None,  # [B, ...]
    known_noise: Tensor | Philox | None = None,  # [B, ...]
    model_input: Tensor | None = None,  # [B, ...] or [2 B, ...]
    return_x0: bool = True,
    return_entry: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One step of any linear sampler.

    Args:
        x: the sample x_t, floating point, [batch, ...].
        m: the model's output, shaped as x.
        row: the coefficients of this step, in the order of ``COLUMNS``: [K], or [batch, K] for one row a sample, with
            K = len(COLUMNS).
        uncond: the unconditional output, for classifier-free guidance m_uncond + guidance (m - m_uncond).
        guidance: the guidance scale: a number, or rows.
        clip: clamp the x0 estimate to [-clip, clip].
        history: up to four tensors kept from earlier steps, the latest first.
        noise: z, shaped as x, or a ``Philox`` to make it from; None adds none, whatever c_noise.
        log_variance: v of a learned variance, shaped as x: the noise is multiplied by exp((l_0 + l_v v) / 2) too.
        threshold: s, one a sample [batch]: the x0 estimate is clamped to [-s, s] and divided by s (dynamic
            thresholding, Saharia et al. 2022).
        mask, known, known_noise: for inpainting, where y becomes mask (k_x0 known + k_n known_noise) + (1 - mask) y.
            The mask is floating point or bool, 1 where the data is known. ``known_noise`` None adds no noise.
        model_input: a buffer that is overwritten with c_in y, the next input of the network: shaped as x, or with twice
            its batch, where both halves get the same.
        return_x0, return_entry: whether these results are wanted. One that is not is None, and is not computed.

    Returns:
        (y, x0 estimate, history entry): y and x0 in the dtype of x, the entry in float32 (float64 for float64).

    Raises TypeError or ValueError for unfit inputs.
    """
    simple = uncond is log_variance is threshold is mask is known is known_noise is model_input is None
    if simple and not history and not return_entry and isinstance(x, Tensor):
        n = noise.whole(x.shape) if isinstance(noise, Philox) else noise
        if n is not None or noise is None:
            done = dispatch.get(x.device).fast_step(x, m, row, clip, n, return_x0)
            if done is not None:
                return *done, None
    check_floating(x=x, model_output=m, row=row)
    tensors = {"uncond": uncond, "log_variance": log_variance}
    tensors |= {f"history[{j}]": entry for j, entry in enumerate(history)}
    check_floating(**{name: tensor for name, tensor in tensors.items() if tensor is not None})
    check_alike(x=x, model_output=m, **tensors)
    check_noise(x=x, noise=noise)
    check_inpainting(x, mask, known, known_noise)
    if model_input is not None:
        check_floating(model_input=model_input)
        if tuple(model_input.shape) not in {(n * len(x), *x.shape[1:]) for n in (1, 2)}:
            raise ValueError(
                f"model_input must be shaped as x, {tuple(x.shape)}, or of twice its batch; "
                f"got {tuple(model_input.shape)}."
            )
    if len(history) > KEPT_STEPS:
        raise ValueError(f"at most {KEPT_STEPS} history tensors are used; got {len(history)}.")
    check_clip(clip)
    batches = () if row.ndim == 1 else x.shape[:1]
    if row.shape != (*batches, len(COLUMNS)):
        raise ValueError(f"row must be [{len(COLUMNS)}] or [batch, {len(COLUMNS)}]; got {tuple(row.shape)}.")
    dtype = compute_dtype(x, m)
    row = row.to(x.device, dtype)
    if isinstance(guidance, Tensor):
        guidance = place_rows("guidance", guidance.to(x.device, dtype), x.shape)
    if threshold is not None:
        threshold = place_rows("threshold", threshold.to(x.device, dtype), x.shape)
    call = StepCall(
        x, m, row, uncond, guidance, clip, tuple(history), noise, log_variance, x.dtype, return_x0, return_entry,
        threshold, mask, known, known_noise, model_input,
    )  # fmt: skip
    return dispatch.run(call, x.device)


def check_inpainting(x: Tensor, mask: Tensor | None, known: Tensor | None, known_noise: Tensor | Philox | None) -> None:
    """Raise TypeError or ValueError unless the three go together and with x."""
    if (mask is None) != (known is None):
        raise ValueError(f"inpainting needs both mask and known; got {'mask' if known is None else 'known'} alone.")
    if mask is None or known is None:
        if known_noise is not None:
            raise ValueError("known_noise was given without mask and known: it goes with both.")
        return
    check_floating(known=known)
    check_alike(x=x, known=known)
    check_noise(x=x, known_noise=known_noise)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool or floating point; got {mask.dtype}: write mask.bool().")
    check_mask(x, mask)


def check_mask(x: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless the mask is where x is, and broadcasts to it."""
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, but x on {x.device}: move one with .to(device).")
    try:
        fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, which does not broadcast to {tuple(x.shape)}.")
