"""Noise as data: the record from which normals and uniforms are made. They are a function of (seed, stream, sample
index, element). So they need not be kept, and they do not depend on the device, the batch or the number of processes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import modes
from .codes import OFFSET_STREAM
from .showing import brief, brief_fields
from .torch_access import _C

# Counters have 32 bits for the group of four elements, and 8 more for the groups of a sample that is in slices.
MOST_OF_SAMPLE, MOST_OF_WHOLE = 2**34, 2**42


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
    DROPOUT = 8  # the uniform by which a condition is dropped
    FRAMES = 9  # noise that all frames of a video share
    STEP = 16  # + the index of the sampling step


class Window(NamedTuple):
    """A slice of each sample: noise is counted by the elements of the whole one.

    Args:
        shape: of the whole sample, without the batch.
        start: where the slice begins in each of its dimensions.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]

    def check(self, sizes: Sequence[int]) -> None:
        """Raise ValueError unless a slice of ``sizes`` lies in the sample, and the sample can be counted."""
        lengths = len(self.shape), len(self.start), len(sizes)
        if len({*lengths}) != 1 or any(s < 0 or s + n > m for m, s, n in zip(self.shape, self.start, sizes)):
            raise ValueError(
                f"a slice {tuple(sizes)} that begins at {tuple(self.start)} is none of a sample of {tuple(self.shape)}."
            )
        if math.prod(self.shape) > MOST_OF_WHOLE:
            raise ValueError(
                f"noise can be made for samples of at most 2^42 elements; the whole one is {tuple(self.shape)}."
            )

    def runs(self, sizes: Sequence[int]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """(place of the first element, sizes, strides) of a slice of ``sizes``, dimensions that can be one being one.
        The last stride is 1."""
        first, stride = 0, 1
        found: list[list[int]] = [[1, 1]]
        for size, own, start in zip(reversed(self.shape), reversed(sizes), reversed(self.start)):
            first += start * stride
            if found[-1][0] * found[-1][1] == stride:
                found[-1][0] *= own
            elif own != 1:
                found.append([own, stride])
            stride *= size
        return first, *(tuple(part) for part in zip(*reversed(found)))


@dataclass(frozen=True)
class Philox:
    """Noise that is made where it is needed: a function of (seed, stream, sample index, element).

    Args:
        seed: 64-bit seed, int64 tensor of one element on the device (or an int).
        sample_offset: the index of the first sample: rows 4 to 7 of a batch are a batch of 4 with offset 4. Or the ids
            of the samples, int64 [batch], on the device: samples of one id get the same noise.
        stream: see ``Stream``.
        offset: strength of the offset noise added, one normal a (sample, channel), channels being dimension 1.
        rng: "exact": the same bits on every device and backend. "fast": on a GPU, Triton's kernels take the logarithm,
            root, sine and cosine from the hardware's approximate instructions: normals within 1e-3 of the exact ones.
            Every other backend makes the exact ones.
    """

    seed: int | Tensor
    sample_offset: int | Tensor = 0
    stream: int = Stream.NOISE
    offset: float = 0.0
    rng: str = "exact"

    __repr__ = brief_fields

    def __post_init__(self):
        check_seed(self.seed)
        check_rng(self.rng)
        if type(self.sample_offset) is not int:
            object.__setattr__(self, "sample_offset", _offset_or_ids(self.sample_offset))

    @property
    def made_from(self) -> tuple[int | Tensor, int | Tensor]:
        """What may be tensors: the seed, and the offset or ids of the samples."""
        return self.seed, self.sample_offset

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless this noise can be made for ``shape``."""
        if math.prod(shape[1:]) > MOST_OF_SAMPLE:
            raise ValueError(
                f"noise can be made for samples of at most 2^34 elements in a process; got {tuple(shape)}. Larger ones "
                f"are for several: see fastdiff.distributed.Part."
            )
        if isinstance(self.sample_offset, Tensor) and len(self.sample_offset) != shape[0]:
            raise ValueError(f"{len(self.sample_offset)} sample ids for the {shape[0]} samples of {tuple(shape)}.")
        if self.offset and len(shape) < 3:
            raise ValueError(
                f"offset noise adds one number a channel, so x0 must be [batch, channels, ...]; got {tuple(shape)}."
            )

    def whole(self, shape: Sequence[int]) -> tuple | None:
        """(seed, stream, sample_offset, offset) as fast calls on the CPU take it; None where they cannot."""
        if (isinstance(self.seed, Tensor) and not self.seed.is_cpu) or (self.offset and len(shape) < 3):
            return None
        return self.seed, self.stream, self.sample_offset, self.offset


# Of processes that hold different samples, each counts its own from its rank times this, where nothing says which
# samples they are: more than any run has, and 2^23 ranks fit in the 64 bits of an index.
SAMPLES_OF_A_RANK = 2**40

_initialized = getattr(torch.distributed, "is_initialized", bool)  # a PyTorch that was built without it has none
_ranks: tuple[int, int] | None = None  # (rank, how many), as ``count_from`` was told


def count_from(ranks: tuple[int, int] | None) -> None:
    """Set (rank, how many) of the processes that hold different samples; None: those of the default process group."""
    global _ranks
    _ranks = ranks


def first_sample() -> int:
    """The index of the first sample that a call makes noise for, where neither a seed nor anything else says which
    samples they are: 0 in a single process."""
    if _ranks is not None:
        return _ranks[0] * SAMPLES_OF_A_RANK
    return torch.distributed.get_rank() * SAMPLES_OF_A_RANK if _initialized() else 0


def seeded(
    seed: int | Tensor | None, generator: torch.Generator | None, ids: Any, sample_offset: Any, batch: int,
    device: torch.device, needed: bool = True,
) -> tuple[Any, int | Tensor]:  # fmt: skip
    """(the seed, drawn from ``generator`` if none is given and one is needed; which samples these are: ``samples_of``).

    Raises TypeError or ValueError for unfit ones, and for a seed together with a generator."""
    given = seed is not None
    if given:
        if generator is not None:
            raise ValueError("pass a generator or a seed, not both.")
        check_seed(seed)
    elif needed:
        seed = _draw_on_host(generator, device) if device.type == "cuda" else None
        if seed is None:
            seed = draw_seed(generator, device)
    if ids is None and sample_offset is None:
        return seed, 0 if given or not (_initialized() or _ranks) else first_sample()
    return seed, samples_of(ids, sample_offset, batch, device)


def samples_of(ids: Any, sample_offset: Any, batch: int, device: torch.device, seed: Any = None) -> int | Tensor:
    """Which samples a batch has: their ids, int64 on ``device``, or the index of the first.

    Args:
        ids, sample_offset: as a user gives them. Without both, samples are counted from 0 where the user gave a
            ``seed``, and from ``first_sample()`` where none was given.

    Raises TypeError or ValueError where ``ids`` are not one whole number a sample, or both are given."""
    if ids is None:
        if sample_offset is None:
            return 0 if seed is not None else first_sample()
        known = type(sample_offset) is int or torch.compiler.is_compiling()  # traced, it may be symbolic
        return sample_offset if known else whole("sample_offset", sample_offset)
    if sample_offset is not None and (type(sample_offset) is not int or sample_offset):
        raise ValueError("ids and sample_offset both say which samples these are: pass one of them.")
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        raise TypeError(f"ids must be a tensor of integers, one a sample; got {brief(ids)}.")
    if ids.shape != (batch,):
        raise ValueError(f"ids must be [{batch}], one a sample; got {tuple(ids.shape)}.")
    return ids.to(device, torch.int64, non_blocking=True).contiguous()


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _offset_or_ids(value: Any) -> int | Tensor:
    if not isinstance(value, Tensor) or not value.ndim:
        return whole("sample_offset", value)
    if value.dtype != torch.int64 or value.ndim != 1:
        raise TypeError(f"sample ids must be int64 [batch]; got {brief(value)}.")
    return value.contiguous()


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
    return seed if source == device else seed.to(device, non_blocking=True)


_drawn_on_host = False


def draws_on_host() -> bool:
    """Whether seeds of a GPU's generator are drawn on the host: one was."""
    return _drawn_on_host


def _draw_on_host(generator: torch.Generator | None, device: torch.device) -> int | None:
    """The number that ``draw_seed`` draws on a CUDA device, without a launch: it is computed from the generator's seed
    and offset, and the offset moves on as by the draw. None where the draw is another's: of another device, captured,
    traced, or watched by a mode of PyTorch."""
    global _drawn_on_host
    if _C is None or torch.version.hip is not None or torch.compiler.is_compiling() or modes.any_mode():
        return None
    here = torch.cuda.current_device()
    if torch.cuda.is_current_stream_capturing() or device.index not in (None, here):  # whose stream may be captured
        return None
    if generator is None:
        generator = torch.cuda.default_generators[here]
    elif not isinstance(generator, torch.Generator) or generator.device.type != "cuda":
        return None
    _drawn_on_host = True
    return _C.draw_seed(generator)
