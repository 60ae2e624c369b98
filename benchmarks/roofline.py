"""What a kernel reaches at best: by its instructions, its bytes and its registers. A prediction, to hold beside a
measurement; the numbers of a GPU are its maker's or, where that is said, measured.

A multiprocessor issues four instructions a clock, each for a warp of 32 threads; so many elements are worked on as that
allows, or as many as the memory brings, whichever is less. Instructions and bytes are those of one element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SCHEDULERS, WARP = 4, 32  # a multiprocessor
REGISTERS, MOST_WARPS = 65536, 64  # a multiprocessor
ISSUED = 0.8  # of the issue slots, where there are enough warps to take turns
ENOUGH_WARPS = 12  # a multiprocessor: three a scheduler, which with what is independent within a warp fill the slots


@dataclass(frozen=True)
class GPU:
    """``clock``: Hz, under load; ``copy``: bytes read and written a second by a copy far larger than the caches."""

    multiprocessors: int
    clock: float
    copy: float


# Clocks are below the highest (1.98 GHz; of a B200 1.96), which power may not allow. Copies are measured ones, with
# PyTorch's copy_; that of the B200 is 88% of its 8 TB/s, as the H200's is of 4.8.
GPUS = {"H100": GPU(132, 1.70e9, 3.0e12), "H200": GPU(132, 1.70e9, 4.3e12), "B200": GPU(148, 1.70e9, 7.0e12)}
# At the least, in bf16, for noise of the fast and of the exact transform (noising, and losses that read x0).
GOALS = {"fast": {"H100": 0.85, "H200": 0.85}, "exact": {"H100": 0.80, "H200": 0.60}}


def gpu_of(name: str) -> GPU | None:
    """The GPU of a name as PyTorch or the driver gives it ("NVIDIA H100 80GB HBM3"); None for another."""
    return next((gpu for known, gpu in GPUS.items() if known in name), None)


def measured(gpu: GPU, clock: float | None = None, copy: float | None = None) -> GPU:
    """``gpu`` with what was read off the machine in place of what is assumed."""
    return replace(gpu, clock=clock or gpu.clock, copy=copy or gpu.copy)


def warps(registers: int) -> int:
    """That fit on a multiprocessor, of kernels with ``registers`` a thread and four warps a program."""
    each = -(-registers // 8) * 8 * WARP
    return min(MOST_WARPS, REGISTERS // each // 4 * 4)


def share_of_copy(instructions: float, moved: float, gpu: GPU, registers: int = 32) -> float:
    """The bandwidth reached, as a share of the copy's, at most 1: of a kernel with so many ``instructions`` and bytes
    ``moved`` an element."""
    issued = ISSUED * min(1.0, warps(registers) / ENOUGH_WARPS)
    elements = gpu.multiprocessors * SCHEDULERS * WARP * gpu.clock * issued / instructions
    return min(1.0, elements * moved / gpu.copy)
