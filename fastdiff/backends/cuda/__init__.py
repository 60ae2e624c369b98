"""The CUDA backend: a sampler step in one launch (csrc/cuda/). All else is the next backend's: Triton's where there is
one, or the reference. So are steps that the kernel does not do: of float64 data, with gradients, under ``torch.func``.

It is built where nvcc is found, loads without a driver, and uses the stream that is current in PyTorch. Nothing in it
waits for the device.
"""

from typing import Any

from .operations import built, description, elsewhere, no_device_because, step, unavailable_because, unfit_because
from .trajectory import Trajectory

__all__ = [
    "Trajectory",
    "built",
    "description",
    "no_device_because",
    "step",
    "unavailable_because",
    "unfit_because",
]


def __getattr__(name: str) -> Any:
    return getattr(elsewhere(), name)
