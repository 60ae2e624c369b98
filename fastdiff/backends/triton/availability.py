"""Whether Triton is there, and what its kernels can run on. Triton itself is imported when something is launched."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

from ..devices import Trial
from .interpreter import interpreted


def _missing() -> str:
    try:
        found = importlib.util.find_spec("triton")
    except ValueError:
        found = None
    if found is None:
        return "No module named 'triton': install it, where there is one for the platform"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""  # under another name, as for AMD and Intel
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < (3, 3):
        return f"Triton {version} is too old: 3.3 or newer is needed"
    return ""


unavailable_because = _missing()


def no_device_because() -> str:
    """Why there is nothing to run on; empty where there is."""
    if unavailable_because:
        return unavailable_because
    if torch.cuda.is_available() or interpreted() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return ""
    return "there is no CUDA, ROCm or XPU device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def _try(device: torch.device) -> None:
    if because := no_device_because():
        raise RuntimeError(because)
    from . import programs

    programs.try_on(device)


# Why the kernels cannot run on a device: Triton does not compile for it, there is no C compiler for its launchers, or
# the driver is too old for what it makes.
unfit_because = Trial(_try)
