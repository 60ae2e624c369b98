"""The noising operation: x_t = alpha x0 + sigma n, with n given or made from a seed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.codes import OFFSET_STREAM
from ..backends.reference.philox import check_seed
from ..showing import brief_fields
from .checks import check_alike, check_floating, compute_dtype, place_all


class Stream:
    """The independent streams of noise of one seed. Part of the definition of the noise: never renumbered."""

    NOISE = 0  # n of x_t
    OFFSET = OFFSET_STREAM  # one normal a (sample, channel), for offset noise
    PERTURBATION = 2  # xi of input perturbation
    TIMESTEP = 3  # the uniform behind t
    INITIAL = 4  # where sampling starts
    STEP = 16  # + the index of the sampling step


@dataclass(frozen=True)
class Philox:
    """Noise that is made where it is needed: a function of (seed, stream, sample index, element).

    Args:
        seed: 64-bit seed, int64 tensor of one element on the device (or an int).
        sample_offset: the index of the first sample: rows 4 to 7 of a batch are a batch of 4 with offset 4.
        stream: see ``Stream``.
        offset: strength of the offset noise added, one normal a (sample, channel), channels being dimension 1.
        rng: "exact": the same bits on every device and backend. "fast": on a GPU, Triton's kernels take the logarithm,
            root, sine and cosine from the hardware's approximate instructions: normals within 1e-3 of the exact ones.
            Every other backend makes the exact ones.
    """

    seed: int | Tensor
    sample_offset: int = 0
    stream: int = Stream.NOISE
    offset: float = 0.0
    rng: str = "exact"

    __repr__ = brief_fields

    def __post_init__(self):
        check_seed(self.seed)
        check_rng(self.rng)
        if type(self.sample_offset) is not int:
            object.__setattr__(self, "sample_offset", whole("sample_offset", self.sample_offset))

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless this noise can be made for ``shape``."""
        if self.offset and len(shape) < 3:
            raise ValueError(
                f"offset noise adds one number a channel, so x0 must be [batch, channels, ...]; got {tuple(shape)}."
            )

    def whole(self, shape: Sequence[int]) -> tuple | None:
        """(seed, stream, sample_offset, offset) as whole calls on the CPU take it; None where they cannot."""
        if (isinstance(self.seed, Tensor) and not self.seed.is_cpu) or (self.offset and len(shape) < 3):
            return None
        return self.seed, self.stream, self.sample_offset, self.offset

    def tensor(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """The noise itself: float32 of ``shape``."""
        backend = backends.get(device)
        normal = backend.normal
        if self.rng == "fast" and getattr(backend, "fast_rng", False):
            normal = partial(normal, rng="fast")
        n = normal(self.seed, tuple(shape), self.stream, self.sample_offset, device=device)
        if self.offset:
            channels = normal(self.seed, tuple(shape[:2]), Stream.OFFSET, self.sample_offset, device=device).reshape(
                *shape[:2], *(1,) * (len(shape) - 2)
            )
            n = n + self.offset * channels
        return n


def noise(
    x0: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    n: Tensor | Philox,
    *,
    perturbation: float = 0.0,
    perturbation_noise: Tensor | Philox | None = None,
    keep_noise: bool = True,
) -> tuple[Tensor, Tensor | Philox]:
    """x_t = alpha x0 + sigma (n + perturbation xi).

    Args:
        x0: clean data, any floating-point dtype and shape [batch, ...].
        alpha, sigma: rows, see ``fastdiff.ops.checks.place_rows``.
        n: the noise, shaped as x0; or a ``Philox`` to make it from.
        perturbation, perturbation_noise: input perturbation (Ning et al. 2023): x_t sees n + perturbation xi, a target
            made with the returned noise does not.
        keep_noise: return noise that was made here as a tensor; False returns the ``Philox``, from which it can be
            made again: no full-size memory.

    Returns:
        (x_t in the dtype of x0, n: what was given, or the noise that was made: float32, float64 with float64 inputs).

    Differentiable in x0, alpha, sigma and a given n. Raises TypeError or ValueError for unfit inputs.
    """
    check_floating(x0=x0)
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
    return backends.get(x0.device).noise(x0, n, alpha, sigma, perturbation, xi, keep_noise)


def whole(name: str, value: Any) -> int:
    """``value`` as an int, NumPy's integers and tensors of one among them. Raises TypeError for a fraction."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number; got {value!r}.") from None


def check_rng(rng: str) -> None:
    """Raise ValueError unless ``rng`` is a way to make normals."""
    if rng not in ("exact", "fast"):
        raise ValueError(f"rng must be 'exact' or 'fast'; got {rng!r}.")


def check_noise(**tensors: Tensor | Philox | None) -> Tensor | None:
    """Check noise against the tensor it goes with, which comes first: the noise if it is a tensor, else None."""
    (_, like), (name, n) = tensors.items()
    if isinstance(n, Philox):
        n.check(like.shape)
    elif n is not None:
        check_floating(**{name: n})
        if n.shape != like.shape or n.device != like.device:
            check_alike(**tensors)  # raises
        return n
    return None
