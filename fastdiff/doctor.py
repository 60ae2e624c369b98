"""``fastdiff doctor``: what this machine and installation offer. It reports what is missing, and never fails for it."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, recycling, torch_randn

OPTIONAL = ("triton", "numpy", "scikit-learn", "matplotlib", "pillow", "tqdm", "diffusers")


def report() -> dict[str, Any]:
    """Versions, devices, optional packages and backends, as plain values."""
    devices = _devices()
    chosen = {device["name"]: backends.choose(torch.device(device["name"])) for device in devices}  # tries them
    return {
        "versions": {
            "fastdiff": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "cuda_runtime": torch.version.cuda,
            "cuda_driver": _cuda_driver(),
            "hip": torch.version.hip,
        },
        "packages": {name: _version(name) for name in OPTIONAL},
        "devices": devices,
        "backends": [
            {
                "name": status.name,
                "available": status.available,
                "reason": status.reason,
                "devices": list(status.devices),
            }
            for status in backends.status()
        ],
        "torch_randn": torch_randn.reason(),
        "new_memory": {"fastdiff": _new_results(chosen["cpu"]), "pytorch": _freed_memory()},
        "chosen": chosen,
    }


def show(as_json: bool) -> None:
    """Print the report."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    _print_table("versions", {name: value or "-" for name, value in found["versions"].items()})
    _print_table("optional packages", {name: value or "not installed" for name, value in found["packages"].items()})
    _print_table("devices", {device["name"]: device["description"] for device in found["devices"]})
    _print_table(
        "backends",
        {
            status["name"]: f"{'available' if status['available'] else 'not available'} ({status['reason']})"
            for status in found["backends"]
        },
    )
    _print_table("backend chosen for", found["chosen"])
    drawn = f"torch.randn ({found['torch_randn']})" if found["torch_randn"] else "the native backend, the same numbers"
    new = found["new_memory"]
    ours = f"new every time ({new['fastdiff']})" if new["fastdiff"] else "used again, from 1 MiB on"
    _print_table("memory of results on a CPU", {"fastdiff's": ours, "PyTorch's": new["pytorch"]})
    _print_table("drawn like torch.randn, on a CPU, by", {"float32": drawn})


def _print_table(heading: str, rows: dict[str, str]) -> None:
    print(heading)
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {
            "name": "cpu",
            "description": f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "description": f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, compute capability "
                f"{properties.major}.{properties.minor}",
                "model": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "description": "Apple Metal", "model": "Apple Metal"})
    return devices


def _new_results(chosen: str) -> str:
    """Why the results of the backend that is chosen for a CPU lie in new memory every time; empty if they do not."""
    return recycling.reason() if chosen == "native" else f"the {chosen} backend leaves that to PyTorch"


def _freed_memory() -> str:
    """What becomes of memory that PyTorch frees on a CPU, as far as the settings of this process tell."""
    loaded = os.environ.get("LD_PRELOAD", "")
    for name in ("tcmalloc", "jemalloc", "mimalloc"):
        if name in loaded:
            return f"{name} decides how much is used again"
    if platform.libc_ver()[0] != "glibc":
        return "the C library decides how much is used again"
    if os.environ.get("MALLOC_MMAP_MAX_") == "0" and "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return "used again, as MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ say"
    return "often new; docs/performance.md says what to set"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _cuda_driver() -> str | None:
    """The newest CUDA version that the driver supports, and the driver's own version where the system tells it."""
    try:
        first_line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return " ".join(first_line.split(":", 1)[-1].split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
