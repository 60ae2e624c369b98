"""The Triton backend: the operations on a GPU, one pass each.

What it does not do, the reference does: float64 data, ``torch.compile`` and ``torch.func``, tensor subclasses, and
gradients that are not those of a training step (of the coefficients, of x0 in a loss, of a step; second derivatives).

Triton is imported at the first call. With TRITON_INTERPRET=1 its interpreter runs the kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch

from ..devices import Trial

_OPERATIONS = (
    *("uniform", "normal", "noise", "noise_and_target", "loss", "loss_gradient", "convert", "step", "launches"),
    *("evaluate", "times"),
)
fast_rng = True  # ``normal`` takes ``rng``: see ``fastdiff.ops.Philox``
remakes_noise = True  # in the loss's launch, faster than it would read it


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
available = not unavailable_because


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter. Triton looks when they are imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def no_device_because() -> str:
    """Why there is nothing to run on; empty where there is."""
    if not available:
        return unavailable_because
    if torch.cuda.is_available() or interpreted() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return ""
    return "there is no CUDA, ROCm or XPU device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def _try(device: torch.device) -> None:
    if because := no_device_because():
        raise RuntimeError(because)
    from . import launch

    launch.try_on(device)


# Why the kernels cannot run on a device: Triton does not compile for it, there is no C compiler for its launchers, or
# the driver is too old for what it makes.
unfit_because = Trial(_try)


def description() -> str:
    """What runs, for ``fastdiff doctor``."""
    import triton

    return f"Triton {triton.__version__}" + (", interpreted" if interpreted() else "")


def __getattr__(name: str) -> Any:
    if name == "direct":  # importing it sets the attribute
        return importlib.import_module(".direct", __name__)
    if name not in _OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import operations

    for known in _OPERATIONS:
        globals()[known] = getattr(operations, known)
    return globals()[name]
