"""Noise as data: the record from which normals and uniforms are made. They are a function of (seed, stream, sample
index, element). So they need not be kept, and they do not depend on the device, the batch or the number of processes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .codes import OFFSET_STREAM
from .showing import brief, brief_fields


class Stream:
    """The independent streams of noise of one seed. Part of the definition of the noise: never renumbered."""

    NOISE = 0  # n of x_t
    OFFSET = OFFSET_STREAM  # one normal a (sample, channel), for offset noise
    PERTURBATION = 2  # xi of input perturbation
    TIMESTEP = 3  # the uniform behind t
    INITIAL = 4  # where sampling starts
    PROBE = 5  # the probes of a likelihood's trace
    PYRAMID = 6  # the coarse levels of multi-resolution noise
    POSTERIOR = 7  # xi of the latents of an autoencoder's moments
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
        """(seed, stream, sample_offset, offset) as fast calls on the CPU take it; None where they cannot."""
        if (isinstance(self.seed, Tensor) and not self.seed.is_cpu) or (self.offset and len(shape) < 3):
            return None
        return self.seed, self.stream, self.sample_offset, self.offset


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


def check_seed(seed: int | Tensor) -> None:
    """Raise TypeError or ValueError unless ``seed`` is any 64 bits: a signed or unsigned number, or an int64 tensor."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed must be one int64; got a tensor {tuple(seed.shape)} of {seed.dtype}.")
    elif isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an integer or an int64 tensor; got {seed!r}.")
    elif not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed must have 64 bits, -2^63 to 2^64 - 1; got {seed}.")


def seed_tensor(seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """``seed`` as an int64 tensor [] on ``device``."""
    check_seed(seed)
    if isinstance(seed, Tensor):
        return seed.to(device).reshape(())
    seed = int(seed)
    # Filled, not copied: a copy to a GPU would wait for it.
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A 64-bit seed, int64 [1] on ``device``, from ``generator`` (None: the device's default one); no host sync."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {brief(generator)}. A number is passed as seed=.")
    source = device if generator is None else generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=source, generator=generator)
    return seed.to(device, non_blocking=True)
