"""Times: how a call is timed, how many of them are summed up, and what the memory allows at best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIN_ROUNDS = 5  # fewer make no ratio
WIDEST = 0.5  # (p80 - p20) / median of the ratios beyond which no ratio is printed
DEFAULT_CACHE = 64 * 2**20
CALIBRATION = 10**7  # cycles: some milliseconds
LAUNCH = 1e-4  # seconds; more than one operation costs the host


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of ``rounds`` samples."""

    median: float
    p20: float
    p80: float
    rounds: int

    @property
    def width(self) -> float:
        return (self.p80 - self.p20) / self.median if self.median else math.inf

    @property
    def steady(self) -> bool:
        """Whether it is narrow enough, and of enough samples, for a ratio to mean something."""
        return self.rounds >= MIN_ROUNDS and self.width <= WIDEST

    @property
    def noise(self) -> tuple[float, float]:
        """Where the median of another run may lie: twice as far from the median as p20 and p80. For normal noise that
        is 1.7 standard deviations of a sample; what drifts between runs shows only in part within one."""
        return self.median - 2 * (self.median - self.p20), self.median + 2 * (self.p80 - self.median)

    def agrees(self, other: Spread) -> bool:
        """Whether the two could be one: their ranges of noise meet."""
        (low, high), (other_low, other_high) = self.noise, other.noise
        return low <= other_high and other_low <= high


def summary(samples: Sequence[float]) -> Spread:
    """The spread of at least one sample."""
    ordered = sorted(samples)
    return Spread(*(_quantile(ordered, q) for q in (0.5, 0.2, 0.8)), len(ordered))


def _quantile(ordered: list[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Timer:
    """Times calls on a device: by the clock on a CPU, by events on a GPU.

    Attributes:
        queued: whether the calls timed last by ``seconds`` with ``host`` were all launched before the device began
            them. Not so where one waits for the device, or where they are more launches than its queue takes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.queued = True
        self._cuda = device.type == "cuda"
        self._cycles = 0.0  # a second, of the device's clock; 0 until it is measured
        if self._cuda:
            self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, calls: Sequence[Callable[[], Any]], host: float | None = None) -> float:
        """Seconds a call, of calls made one after the other.

        With ``host``, about what a call costs the host, a GPU pauses until all are launched, so the time is its own.
        Without, small calls show the pace of the host.
        """
        if self._cuda:
            pause = 0.0 if host is None else 2 * host * len(calls)
            for _ in range(3):
                if pause:
                    self._pause(pause)
                began = time.perf_counter()
                self._start.record()
                for call in calls:
                    call()
                self.queued = not self._start.query()
                self._stop.record()
                launching = time.perf_counter() - began
                self._stop.synchronize()
                if self.queued or not pause:
                    break
                pause = 2 * launching
            return self._start.elapsed_time(self._stop) / 1e3 / len(calls)
        start = time.perf_counter()
        for call in calls:
            call()
        self.synchronize()
        return (time.perf_counter() - start) / len(calls)

    def host_seconds(self, call: Callable[[], Any], samples: int = 30, most: float = 0.02) -> float:
        """Median seconds until a call returns, the device idle before it. Takes at most about ``most`` seconds."""
        found: list[float] = []
        spent = 0.0
        while len(found) < 3 or (len(found) < samples and spent < most):
            self.synchronize()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
            spent += found[-1]
        return summary(found).median

    def _pause(self, seconds: float) -> None:
        """Keep the device from what is launched next."""
        if not self._cycles:
            for _ in range(2):  # the first wakes it up
                self._start.record()
                torch.cuda._sleep(CALIBRATION)
                self._stop.record()
                self._stop.synchronize()
            self._cycles = CALIBRATION / (self._start.elapsed_time(self._stop) / 1e3)
        torch.cuda._sleep(int(seconds * self._cycles) + 1)

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)
        elif self.device.type in ("mps", "xpu"):
            getattr(torch, self.device.type).synchronize()


def cache_bytes(device: torch.device) -> int:
    """The last cache before the memory: a GPU's L2, a CPU's largest. An assumed one where it is not told."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or DEFAULT_CACHE
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=DEFAULT_CACHE)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free, or None where it is not told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class Copy:
    """What a plain copy between two buffers far larger than the cache moves (read and written), with the threads that
    everything else runs with. Measured at several times of a run, so that its spread takes in what drifts."""

    def __init__(self, timer: Timer, megabytes: int | None = None):
        self._timer = timer
        size = max(64 * 2**20, 4 * cache_bytes(timer.device)) if megabytes is None else megabytes * 2**20
        free = free_bytes(timer.device)
        self.buffer_bytes = size if free is None else min(size, free // 8)
        self.rates: list[float] = []  # bytes a second

    def measure(self, rounds: int = 10) -> None:
        """Add ``rounds`` samples. Raises what an allocation raises where there is no memory for it."""
        source = torch.ones(self.buffer_bytes, dtype=torch.uint8, device=self._timer.device)
        target = torch.empty_like(source)
        for _ in range(2):
            target.copy_(source)
        copies = [lambda: target.copy_(source)]
        self.rates += [2 * self.buffer_bytes / self._timer.seconds(copies, LAUNCH) for _ in range(rounds)]

    def values(self) -> dict[str, Any] | None:
        """The ceiling as it stands in a report, or None where it was not measured."""
        if not self.rates:
            return None
        found = summary(self.rates)
        return {
            "buffer_bytes": self.buffer_bytes,
            "bytes_per_second": found.median,
            "p20": found.p20,
            "p80": found.p80,
            "rounds": found.rounds,
        }
