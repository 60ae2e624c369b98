"""Runs ``benchmarks/gpu_numbers.py`` without a GPU: what decides what is measured, compiled, recorded and when.

    python tests/bench/stand_in/device.py ARGUMENTS

With STAND_IN_FEW=1 a few kernels stand for all. The last line printed has what the driver counted.

Triton compiles its kernels for sm_90 and launches them, through its own launchers, into a driver that counts and does
nothing (cuda.c). Tensors lie on the CPU. A launch takes LAUNCH_SECONDS, a copy COPY_SECONDS of a device whose events
and sleep are made up here, whatever the host does meanwhile. So times are known beforehand, and results are wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from driver import build  # noqa: E402

LAUNCH_SECONDS, COPY_SECONDS = 2e-6, 4e-6
FEW = ("copy, bf16", "noising, exact, bf16", "loss v, fast, bf16", "step, given, bf16", "noising images, exact, bf16")
os.environ["TRITON_INTERPRET"] = "0"


def driver(folder: Path) -> ctypes.CDLL:
    """The stand-in for libcuda.so.1, built in ``folder`` and found by Triton and its launchers."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return build(folder)


class Device:
    """When what was queued will be done."""

    def __init__(self, library: ctypes.CDLL):
        self._library, self._seen, self._busy = library, 0, 0.0

    def done(self) -> float:
        launched = self._library.stand_in_launched()
        self._busy = max(self._busy, time.perf_counter() if launched > self._seen else 0.0)
        self._busy += LAUNCH_SECONDS * (launched - self._seen)
        self._seen = launched
        return max(self._busy, time.perf_counter())

    def copy(self) -> None:
        self._busy = self.done() + COPY_SECONDS

    def sleep(self, cycles: int) -> None:
        self._busy = self.done() + cycles / 1e9

    def synchronize(self, *_: Any) -> None:
        time.sleep(max(0.0, self.done() - time.perf_counter()))


def put_in_place(device: Device) -> None:
    """PyTorch's view of a GPU, as far as it is looked at."""
    import torch

    class Event:
        def __init__(self, **_: Any):
            self.time = 0.0

        def record(self) -> None:
            self.time = device.done()

        def query(self) -> bool:
            return time.perf_counter() >= self.time

        def synchronize(self) -> None:
            time.sleep(max(0.0, self.time - time.perf_counter()))

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.time - self.time)

    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, L2_cache_size=2**20,
        total_memory=80 * 2**30, clock_rate=1_000_000,
    )  # fmt: skip
    stands_in = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: properties.name,
        "set_device": lambda *_: None,
        "synchronize": device.synchronize,
        "_sleep": device.sleep,
        "Event": Event,
    }
    for name, value in stands_in.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    copy = torch.Tensor.copy_

    def timed_copy(*arguments: Any) -> torch.Tensor:
        device.copy()
        return copy(*arguments)

    torch.Tensor.copy_ = timed_copy


def take_for_a_gpu() -> None:
    """Tensors on the CPU go where a GPU's would, and values are not looked at."""
    import torch

    from fastdiff import objective, process
    from fastdiff.backends import registry
    from fastdiff.backends.triton import arguments, fast, launch

    for module in (fast, objective, process):
        module.value_checks_are_free = lambda tensor: False
    launch._direct = launch.has_approximate_instructions = lambda device: True
    launch._stream = lambda device: 0
    arguments.runs_on = lambda device: True
    registry._TRIED["triton"].found[torch.device("cuda", 0)] = ""  # it fits


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        library = driver(Path(folder))
        device = Device(library)
        put_in_place(device)
        sys.path.insert(0, str(HERE.parents[2] / "benchmarks"))
        import gpu_numbers
        import torch

        from fastdiff import backends

        gpu_numbers.DEVICE = torch.device("cpu")
        take_for_a_gpu()
        gpu_numbers.cache_bytes = lambda device: 2**20
        if os.environ.get("STAND_IN_FEW"):
            every, steps = gpu_numbers.measurements, gpu_numbers.step_cases
            gpu_numbers.measurements = lambda exponents: [m for m in every(exponents) if m.name in FEW]
            gpu_numbers.step_cases = lambda exponents: steps(exponents)[:1]
        timer = gpu_numbers.Timer
        gpu_numbers.Timer = lambda device: timer(torch.device("cuda", 0))
        with backends.use_backend("triton"), contextlib.redirect_stdout(sys.stderr):
            status = gpu_numbers.main(sys.argv[2:] if sys.argv[1].endswith(".py") else sys.argv[1:])
        counts = {name: getattr(library, f"stand_in_{name}")() for name in ("modules", "launched", "refused")}
        print(json.dumps(counts))
        return status


if __name__ == "__main__":
    sys.exit(main())
