"""Memory for large results on a CPU, used again once nobody holds it.

A result of an operation is new memory, which the system hands out page by page as it is first written. That takes
several times as long as a pass over memory that has been written before. What a C library gives back to the system, and
when, depends on sizes and on the order of calls; from 32 MiB on it always does. So the storages that results lie in are
kept here, and the next result of the same size is made in one that is free.

They are PyTorch's own storages, from PyTorch's own allocator, and the results are ordinary tensors, which can be
resized, shared, saved and moved as any other. A storage is free if it is as it was before it was first handed out. The
object in C++ is compared bit by bit, for it tells how many hold it (tensors and their views, arrays of NumPy, DLPack's
capsules, what autograd saved), how many refer to it weakly, where its memory is, how large it is and who frees it. Of
the object in Python, its references, weak references and attributes are looked at. A storage that was resized, shared
with another process, made copy-on-write or is referred to weakly is not used again, and not kept for long. Where
PyTorch lays these things out so that a change would not be seen (``_sees_changes`` tries it), nothing is kept.

There is no lock, so none that a fork could leave closed: a storage is taken out of the list before it is handed out,
and no two threads can take out the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Sequence
from sys import getrefcount
from typing import Any
from weakref import getweakrefcount

import torch
from torch import Tensor

LEAST = 1 << 20  # bytes of a result; the memory of a smaller one comes sooner than a free storage is found
MOST = 1 << 30  # bytes of all storages that are kept
MOST_STORAGES = 32
SECONDS = 10.0  # that a storage is kept for while nobody uses it

_modes, _deterministic = torch._C._len_torch_dispatch_stack, torch.are_deterministic_algorithms_enabled
_IMAGE = ctypes.c_char * 64  # what is compared of a storage: all but what comes after its size and flags


class _Kept:
    """A storage, and what it is like when nobody holds it."""

    __slots__ = ("address", "bits", "free_bits", "free_references", "nbytes", "storage", "unused_since")

    def __init__(self, nbytes: int):
        self.storage = torch.UntypedStorage(nbytes, device="cpu")
        self.nbytes = nbytes
        self.address = self.storage._cdata
        self.bits = _IMAGE.from_address(self.address)
        self.free_bits, self.free_references = self.bits.raw, getrefcount(self.storage)
        self.unused_since: float | None = None  # when it was first seen to be free; None: it was not, when last seen

    def free(self) -> bool:
        """Whether it can be handed out."""
        return (
            self.bits.raw == self.free_bits
            and getrefcount(self.storage) == self.free_references
            and not getweakrefcount(self.storage)
            and not self.storage.__dict__
        )

    def held(self) -> bool:
        """Whether somebody holds it, now."""
        return torch._C._storage_Use_Count(self.address) > 1 or getrefcount(self.storage) > self.free_references

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] = ()) -> Tensor:
        return torch.empty(0, dtype=dtype, device="cpu").set_(self.storage, 0, shape, stride)


_kept: list[_Kept] = []  # those that were handed out last come last
_next_look = 0.0


def empty(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
    """A new tensor on the CPU, as of ``torch.empty``; with ``stride``, as of ``torch.empty_strided``, without gaps."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not LEAST <= nbytes <= MOST or not _recycles():
        if stride is None:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
    kept = _take(nbytes) or _new(nbytes)
    made = kept.tensor(shape, dtype, stride or ())
    _kept.append(kept)
    _look_if_due()
    return made


def empty_like(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty_like``."""
    dtype = dtype or tensor.dtype
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    if not plain or not tensor.is_cpu or not _recycles():
        return torch.empty_like(tensor, dtype=dtype)
    if not tensor.is_contiguous():
        return empty(tensor.shape, dtype, torch.empty_like(tensor, device="meta").stride())
    return empty(tensor.shape, dtype, tensor.stride())


def release_memory() -> int:
    """Give back the memory that is kept for the next results on a CPU, and return how many bytes that were.

    Results of 1 MiB and more on a CPU come from memory that is used again, because the system takes longer to hand out
    new memory than an operation takes to fill it. At most 1 GiB is kept. What nobody uses for 10 seconds goes back when
    fastdiff next makes such a result, or Python next collects garbage. Results that are still held are left alone.
    """
    kept, _kept[:] = tuple(_kept), ()
    released = sum(each.nbytes for each in kept if not each.held())
    del kept
    _trim()
    return released


def reason() -> str:
    """Why no memory is kept; empty if it is."""
    return _reason


def _trim() -> None:
    """Have the C library give back to the system what is free, where it has a function for that."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _recycles() -> bool:
    """Whether a new tensor is no more than memory, whatever it holds: no mode of PyTorch looks on, and new memory need
    not be filled."""
    filled = _deterministic() and torch.utils.deterministic.fill_uninitialized_memory
    return not (_reason or filled or _modes())


def _take(nbytes: int) -> _Kept | None:
    """A free storage of that size, which nobody else can take from now on: the one that was handed out last, of which
    most is in the caches."""
    for kept in _kept[::-1]:
        if kept.nbytes == nbytes and kept.free():
            try:
                _kept.remove(kept)
            except ValueError:  # another thread took it
                continue
            if kept.free():
                kept.unused_since = None
                return kept
            _kept.append(kept)  # another thread took it, and put it back, in between
    return None


def _new(nbytes: int) -> _Kept:
    """A new storage. What was handed out longest ago is no longer kept, if it would be too much."""
    with contextlib.suppress(IndexError):  # another thread released them
        while len(_kept) >= MOST_STORAGES or sum(kept.nbytes for kept in tuple(_kept)) + nbytes > MOST:
            _kept.pop(0)
    try:
        return _Kept(nbytes)
    except RuntimeError:  # there is no memory: what is free may be enough
        release_memory()
        return _Kept(nbytes)


def _look_if_due(*_: Any) -> None:
    """From time to time, no longer keep what nobody used for a while, and what has changed."""
    global _next_look
    now = time.monotonic()
    if now < _next_look or not _kept:
        return
    _next_look = now + SECONDS / 10
    for kept in tuple(_kept):
        if kept.held():
            kept.unused_since = None
            continue
        free, since = kept.free(), kept.unused_since  # both once: another thread may take it at any time
        if free and since is None:
            kept.unused_since = now
        elif not free or now - since > SECONDS:
            with contextlib.suppress(ValueError):
                _kept.remove(kept)


def _sees_changes() -> bool:
    """Whether it is seen that somebody holds a storage, or refers to it weakly, and that nobody does any more."""
    try:
        kept = _Kept(64)
        seen = [kept.free() and not kept.held()]
        tensor = kept.tensor((16,), torch.float32)
        seen.append(kept.held() and not kept.free())
        del tensor
        seen.append(kept.free() and not kept.held())
        weak = kept.storage._weak_ref()
        seen.append(not kept.free() and not kept.held())
        kept.storage._free_weak_ref(weak)
        seen.append(kept.free())
        kept.storage.resize_(0)
        seen.append(not kept.free())
        return all(seen)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


_reason = "" if _sees_changes() else "this PyTorch lays out its storages otherwise than is known"
if not _reason:
    gc.callbacks.append(_look_if_due)
