"""Which tensors the kernels take, and what they are told of noise and of memory formats.

A prediction that is dense in another order of dimensions (channels_last) has all operands taken in that order, without
a copy. Where noise is made, which counts elements in logical order, there is a copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import modes
from ...calls import Packed
from ...tensors import Gathered
from ..interface import TRANSFORMED
from ..layout import memory_order
from . import launch
from .availability import unfit_because

TYPES = (Tensor, torch.nn.Parameter)
DATA = (torch.float32, torch.bfloat16, torch.float16)


def runs_on(device: torch.device) -> bool:
    if device.type == "cuda" or device.type == "xpu":
        return not unfit_because(device)
    return launch.INTERPRETED and device.type == "cpu"


def untouched() -> bool:
    """Whether tensors are what their memory says: none is traced or transformed (``modes.wrapping``)."""
    return not torch.compiler.is_compiling() and modes.wrapping() is None


def fits(*tensors: Any, images: bool = False) -> bool:
    """Whether the kernels take these tensors (anything else among the arguments is passed over). ``images``: bytes are
    decoded as x0 / 127.5 - 1, which is for x0 alone."""
    for t in tensors:
        if images and isinstance(t, Tensor) and type(t) in TYPES and t.dtype == torch.uint8:
            continue
        if isinstance(t, Tensor) and not (type(t) in TYPES and t.dtype in DATA and not t.is_neg()):
            return False
    return True


def rows_fit(*rows: Any) -> bool:
    """Whether the kernels take these coefficients: float32, in the computation's precision."""
    for row in rows:
        row = row.column if isinstance(row, Gathered) else row
        if isinstance(row, Tensor) and not (type(row) in TYPES and row.dtype == torch.float32):
            return False
    return True


def unsuited(device: torch.device, data: tuple, rows: tuple, images: bool = False) -> str:
    """Why the kernels do not take full-size ``data`` and the coefficients ``rows``; empty where they do. ``data``
    begins with what sets the size. ``images``: see ``fits``."""
    if not untouched():
        return TRANSFORMED
    if not runs_on(device):
        return f"the kernels do not run on {device}"
    if not fits(*data, images=images):
        return "a subclass of Tensor, one negated as it is read, or another dtype than float32, bfloat16 and float16"
    if not rows_fit(*rows):
        return "coefficients in another dtype than float32"
    return "" if data[0].numel() else "no elements"


def permuted(tensors: tuple, rows: tuple) -> tuple[tuple[int, ...] | None, list, list]:
    """(order, tensors, rows) with the tensors contiguous. Where the first is dense in another order of dimensions
    (channels_last, transposed) all are taken in that order, and ``order`` leads back; but noise that is made counts
    elements in the logical order, so then, and for what has gaps, it is a copy."""
    first = tensors[0]
    if all(t is None or isinstance(t, Tensor) for t in tensors):
        order = memory_order(first)
        if order is not None:
            back = tuple(sorted(range(first.ndim), key=order.__getitem__))
            rows = [
                Gathered(row.column, row.index.permute(order))
                if isinstance(row, Gathered)
                else row.permute(order)
                if isinstance(row, Tensor)
                else row
                for row in rows
            ]
            return back, [t if t is None else t.permute(order).contiguous() for t in tensors], rows
    return None, [t.contiguous() if isinstance(t, Tensor) else t for t in tensors], list(rows)


def in_format_of(tensor: Tensor, result: Tensor | None) -> Tensor | None:
    """``result`` in the memory format of ``tensor``: a channels_last network gets a channels_last x_t."""
    if result is None or tensor.is_contiguous():
        return result
    return torch.empty_like(tensor, dtype=result.dtype).copy_(result)


def source_of(n: Any, device: torch.device) -> tuple[tuple, tuple]:
    """((seed, ids, stream, sample_offset, strength), (kind, kind of seed, whether there is an offset)) of noise: a
    tensor, a ``fastdiff.ops.Philox`` or None."""
    if n is None or isinstance(n, Tensor):
        return (None, None, 0, 0, 0.0), ("none" if n is None else "tensor", "number", False)
    seed, kind = seed_of(n.seed, device)
    first, ids = samples_on(device, n.sample_offset)
    return (seed, ids, n.stream, first, float(n.offset)), (n.rng, kind, bool(n.offset))


def seed_of(seed: int | Tensor, device: torch.device) -> tuple[int | Tensor, str]:
    if isinstance(seed, Tensor):
        if seed.device == device:
            return seed, "tensor"
        if seed.device.type != "cpu":
            return seed.to(device), "tensor"
    seed = int(seed)
    return seed - 2**64 if seed >= 2**63 else seed, "number"


def samples_on(device: torch.device, sample_offset: int | Tensor) -> tuple[int, Tensor | None]:
    """(the index of the first sample, None), or (0, ids on the device)."""
    return (0, sample_offset.to(device)) if isinstance(sample_offset, Tensor) else (sample_offset, None)


MOST_SEQUENCES = (1 << 16) - 1  # programs in the second dimension of a grid


def too_many(packed: Packed) -> str:
    """Why the kernels do not take packed sequences; empty if they do."""
    return "" if packed.sequences <= MOST_SEQUENCES else f"more than {MOST_SEQUENCES} sequences"


def starts_on(device: torch.device, packed: Packed) -> Tensor:
    """Where packed sequences start, on the device; the copy is not waited for."""
    return packed.starts.to(device, non_blocking=True)


class Seeded(NamedTuple):
    """Noise that a kernel makes: what it asks of a ``fastdiff.ops.Philox``, known to be right."""

    seed: int | Tensor
    stream: int
    sample_offset: int | Tensor
    offset: float
    rng: str


def device_of(device: Any, seed: Any) -> torch.device:
    if device is None:
        return seed.device if isinstance(seed, Tensor) else torch.get_default_device()
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def makes(seed: Any, device: Any) -> str:
    """Why noise of this seed cannot be made here for ``device``; empty if it can."""
    if not untouched():
        return TRANSFORMED
    where = device_of(device, seed)
    return "" if runs_on(where) else f"the kernels do not run on {where}"
