"""The noising operation: x_t = alpha x0 + sigma n, with n given or made from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..calls import NoiseCall, Packed
from ..philox import MOST_OF_SAMPLE, Philox, Stream, Window
from . import dispatch
from .checks import check_alike, check_data, check_floating, compute_dtype, place_all


def noise(
    x0: Tensor,  # [B, ...]
    alpha: Tensor | float,  # [B], or another shape that place_rows takes
    sigma: Tensor | float,  # as alpha
    n: Tensor | Philox,  # [B, ...]
    *,
    perturbation: float = 0.0,
    perturbation_noise: Tensor | Philox | None = None,  # [B, ...]
    keep_noise: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | Philox]:
    """x_t = alpha x0 + sigma (n + perturbation xi).

    Args:
        x0: clean data, any floating-point dtype and shape [batch, ...]. Or, with ``dtype``, uint8 images, which stand
            for x0 / 127.5 - 1: they are decoded in the same pass, with the bits of decoding them in float32 first.
        alpha, sigma: rows, see ``fastdiff.ops.checks.place_rows``.
        n: the noise, shaped as x0; or a ``Philox`` to make it from.
        perturbation, perturbation_noise: input perturbation (Ning et al. 2023): x_t is made with n + perturbation xi,
            but the noise that is returned, of which a target is made, is n.
        keep_noise: True returns noise that was made here as a tensor. False returns the ``Philox``, from which it can
            be made again, and takes no full-size memory.
        dtype: of x_t: float32, bfloat16 or float16; None: the dtype of x0.

    Returns:
        (x_t, n): x_t in ``dtype``; n as it was given, or the noise that was made, in float32 (float64 with
        float64 inputs).

    Differentiable in a floating x0, alpha, sigma and a given n. Raises TypeError or ValueError for unfit inputs.
    """
    check_data(x0, dtype)
    given = check_noise(x0=x0, noise=n)
    xi = None
    if perturbation:
        if perturbation_noise is None:
            raise ValueError(
                f"perturbation={perturbation} needs perturbation_noise: a tensor like x0, or a Philox; got none."
            )
        check_noise(x0=x0, perturbation_noise=perturbation_noise)
        xi = perturbation_noise
    alpha, sigma = place_all(x0.shape, compute_dtype(x0, given), x0.device, alpha=alpha, sigma=sigma)
    call = NoiseCall(x0, n, alpha, sigma, perturbation, xi, keep_noise, dtype)
    return dispatch.run(call, x0.device)


def materialize(noise: Philox, shape: Sequence[int], device: torch.device, *, window: Window | None = None) -> Tensor:
    """Make noise into a tensor: float32 of ``shape`` on ``device``.

    Args:
        noise: which noise.
        shape: [batch, ...].
        device: where it is made.
        window: the tensor is a slice of each sample: ``Window(shape of the whole sample, where the slice begins)``,
            both without the batch. Then it holds the noise that the slice has in the whole.

    Raises ValueError for ids, a shape or a window that do not go together, and for samples of more than 2^34 elements
    (2^42 for a whole sample that there are slices of).
    """
    if isinstance(noise.sample_offset, Tensor) or math.prod(shape[1:]) > MOST_OF_SAMPLE:
        noise.check(shape)
    if window is not None:
        window.check(shape[1:])
    return dispatch.get(torch.device(device)).materialize(noise, shape, torch.device(device), window)


def made_noise(
    x0: Tensor, seed: int | Tensor, sample_offset: int | Tensor, strength: float, dim: int, rng: str,
    window: Window | None = None,
) -> Tensor:  # fmt: skip
    """Noise as a tensor, with offsets of ``strength`` along dimension ``dim``: float32 (float64 for float64 data),
    shaped as x0, which may be a slice of each sample."""
    if not strength or dim == 1:
        made = Philox(seed, sample_offset, offset=strength, rng=rng)
        return materialize(made, x0.shape, x0.device, window=window).to(compute_dtype(x0))
    along = dim + x0.ndim if dim < 0 else dim
    if not 0 < along < x0.ndim or x0.ndim < 3:
        raise ValueError(
            f"noise_offset_dim={dim} is no channels' dimension of {tuple(x0.shape)}: offset noise needs a batch, "
            f"channels, and what shares them."
        )
    n = materialize(Philox(seed, sample_offset, rng=rng), x0.shape, x0.device, window=window)
    shape, channels = [len(x0), x0.shape[along]], None
    if window is not None:
        channels = Window((window.shape[along - 1],), (window.start[along - 1],))
    offsets = materialize(Philox(seed, sample_offset, Stream.OFFSET, rng=rng), shape, x0.device, window=channels)
    spread = [len(x0), *(x0.shape[d] if d == along else 1 for d in range(1, x0.ndim))]
    return (n + strength * offsets.reshape(spread)).to(compute_dtype(x0))


def check_noise(packed: Packed | None = None, /, **tensors: Tensor | Philox | None) -> Tensor | None:
    """Check noise against the tensor it goes with, which comes first: the noise if it is a tensor, else None."""
    (_, like), (name, n) = tensors.items()
    if isinstance(n, Philox):
        n.check(like.shape if packed is None else packed.rows(like.shape))
    elif n is not None:
        check_floating(**{name: n})
        if n.shape != like.shape or n.device != like.device:
            check_alike(**tensors)  # raises
        return n
    return None
