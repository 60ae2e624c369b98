"""What the C library does with memory that is freed, for benchmarks on a CPU."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, as it does in a training loop: else it depends on the order of calls which
    of them gets fresh memory from the system, which takes longer than they do."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
