"""What ``torch.randn`` draws on the CPU in float32, to the bit, several times faster (csrc/cpu/torch_normals.h).

It is PyTorch's generator, and its state is left as PyTorch would leave it: whatever else is drawn stays in step. Before
the first draw it is tried out, once, that this PyTorch draws as expected; if not, torch.randn draws.

Python's lock is held from the reading of a state to its writing. Threads of C++ that draw from the same generator at
that time are not reckoned with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import operations

_is_compiling = torch.compiler.is_compiling
_reason: str | None = None  # why torch.randn draws; "" if it does not; None: not tried yet
_LEAST = 16  # below, PyTorch draws in another way


def reason() -> str:
    """Why ``torch.randn`` is left to draw; empty if it is not. Tries it out at the first call."""
    global _reason
    if _reason is None:
        if operations._C is None:
            _reason = operations.unavailable_because
        elif operations._C.simd() == "baseline":
            _reason = "this machine has no vector instructions to draw faster with"
        else:
            from .prepared import reads_tensors

            _reason = "" if reads_tensors else "this version of PyTorch does not show its tensors to C"
            if reads_tensors and not _same_bits():
                _reason = "this build of PyTorch draws other bits than expected"
        if operations._C is not None:
            operations._C.allow_draws(not _reason)
    return _reason


def _same_bits() -> bool:
    """Whether the numbers and the states are those of torch.randn: at several places of a state, for whole chunks and a
    rest, beyond several twists, and with a normal that is left over from a draw of one."""
    ours, theirs = torch.Generator("cpu"), torch.Generator("cpu")
    for seed, (before, count) in enumerate([(0, 16), (1, 17), (609, 48), (623, 4100), (624, 3007), (700, 625)]):
        for generator in (ours, theirs):
            generator.manual_seed(seed)
            if before:
                torch.rand(before, generator=generator, device="cpu")
            torch.randn(seed % 2, generator=generator, device="cpu", dtype=torch.float32)
        expected = torch.randn(count, generator=theirs, device="cpu", dtype=torch.float32)
        drawn = torch.empty(count, device="cpu", dtype=torch.float32)
        if not _fill(drawn, ours) or not torch.equal(drawn.view(torch.int32), expected.view(torch.int32)):
            return False
        if not torch.equal(ours.get_state(), theirs.get_state()):
            return False
    return True


def _fill(z: Tensor, generator: torch.Generator | None) -> bool:
    return operations._C.torch_normal(generator, (z.data_ptr(), 0, z.numel()), torch.get_num_threads())


def _plain() -> bool:
    return not _is_compiling() and operations._wrapping() is None and not (reason() if _reason is None else _reason)


def _fills(z: Any, generator: Any) -> bool:
    """Draw into ``z``, if it is what torch.randn would draw in the way that is known; whether that was done."""
    if type(z) is not Tensor or z.dtype is not torch.float32 or not z.is_cpu or z.numel() < _LEAST:
        return False
    if not z.is_contiguous() or not (generator is None or type(generator) is torch.Generator):
        return False
    return _fill(z, generator)


def randn(
    shape: Sequence[int], *, generator: Any = None, device: Any = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``torch.randn(shape, generator=generator, device=device, dtype=dtype)``."""
    if _plain():
        z = torch.empty(shape, device=device, dtype=dtype)
        if _fills(z, generator):
            return z
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def randn_like(x: Tensor, *, generator: Any = None) -> Tensor:
    """``torch.randn_like(x)``, on a generator if one is given."""
    if _plain():
        z = torch.empty_like(x)
        if _fills(z, generator):
            return z
    if generator is None:
        return torch.randn_like(x)
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
