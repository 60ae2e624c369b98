"""The draws of ``torch.randn`` on the CPU, to the bit and several times faster (seven times on one core with AVX-512):
csrc/cpu/torch_normals.h. In bfloat16 and float16 they are the same numbers, rounded.

PyTorch's own generator is used, and its state is left as PyTorch would leave it: everything else that is drawn stays in
step. Which bits PyTorch draws depends on how it was built. So the first draw is preceded by a comparison with
torch.randn, which takes a millisecond; if one bit differs, torch.randn draws, and ``fastdiff doctor`` says so. Other
dtypes, and fewer than 16 numbers, are torch.randn's.

Python's lock is held from the reading of a state to its writing. Threads of C++ that draw from the same generator at
that time are not reckoned with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import recycling
from .codes import DTYPES
from .modes import wrapping
from .torch_access import _C, unavailable_because

_is_compiling, _modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
_reason: str | None = None  # why torch.randn draws; "" if it does not; None: not tried yet
_LEAST = 16  # below, PyTorch draws in another way
_CODES = {dtype: DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_narrow: bool | None = None  # whether 16-bit numbers are drawn as expected; None: not tried yet


def reason() -> str:
    """Why ``torch.randn`` is left to draw; empty if it is not. Tries it out at the first call."""
    global _reason
    if _reason is None:
        if _C is None:
            _reason = unavailable_because
        elif _C.simd() == "baseline":
            _reason = "this machine has no vector instructions to draw faster with"
        else:
            _reason = "" if _same_bits() else "this build of PyTorch draws other bits than expected"
        if _C is not None:
            _C.allow_draws(0 if _reason else 1)
    return _reason


def _draws_narrow() -> bool:
    """Whether bfloat16 and float16 too are drawn as expected; tried out at the first call. Where PyTorch computed them
    otherwise, with other functions, few would be rounded differently, so many are compared."""
    global _narrow
    if _narrow is None:
        ours, theirs = torch.Generator("cpu").manual_seed(1), torch.Generator("cpu").manual_seed(1)
        _narrow = _same(20_000, torch.bfloat16, ours, theirs) and _same(200_000, torch.float16, ours, theirs)
        if _narrow:
            _C.allow_draws(2)
    return _narrow


def _same(count: int, dtype: torch.dtype, ours: torch.Generator, theirs: torch.Generator) -> bool:
    expected = torch.randn(count, generator=theirs, device="cpu", dtype=dtype)
    drawn = torch.empty(count, device="cpu", dtype=dtype)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    return (
        _fill(drawn, ours)
        and torch.equal(drawn.view(bits), expected.view(bits))
        and torch.equal(ours.get_state(), theirs.get_state())
    )


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
        if not _same(count, torch.float32, ours, theirs):
            return False
    return True


def _fill(z: Tensor, generator: torch.Generator | None) -> bool:
    return _C.torch_normal(generator, (z.data_ptr(), _CODES[z.dtype], z.numel()), torch.get_num_threads())


def _plain() -> bool:
    """Whether anything may be drawn here: nothing is traced, transformed, or intercepted by a mode."""
    if _is_compiling() or wrapping() is not None or _modes():
        return False
    return not (reason() if _reason is None else _reason)


def _fills(z: Any, generator: Any) -> bool:
    """Draw into ``z``, if it is what torch.randn would draw in the way that is known; whether that was done."""
    if type(z) is not Tensor or z.dtype not in _CODES or not z.is_cpu or z.numel() < _LEAST:
        return False
    if not z.is_contiguous() or not (generator is None or type(generator) is torch.Generator):
        return False
    if z.dtype is not torch.float32 and not (_draws_narrow() if _narrow is None else _narrow):
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
        z = recycling.empty_like(x) if x.nbytes >= recycling.LEAST else torch.empty_like(x)
        if _fills(z, generator):
            return z
    if generator is None:
        return torch.randn_like(x)
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
