"""The native backend: the operations on the CPU in C++ (csrc/), vectorised, one pass each.

What it does not do, the reference does: under ``torch.func``, for tensor subclasses, and where
gradients are asked for that are not those of a training step (of the coefficients, of x0 in a loss, of a step).
"""

from ...torch_access import unavailable_because
from . import direct as _direct
from .operations import (
    available,
    convert,
    description,
    gather,
    loss,
    loss_gradient,
    noise,
    normal,
    step,
    uniform,
)
from .prepared import noise_runner, row_runner, run_noise, run_row
from .trajectory import Trajectory

# Whole calls on plain tensors, with a PyTorch that has what they need.
direct = _direct if _direct.available else None

__all__ = [
    "Trajectory",
    "available",
    "convert",
    "description",
    "direct",
    "gather",
    "loss",
    "loss_gradient",
    "noise",
    "noise_runner",
    "normal",
    "row_runner",
    "run_noise",
    "run_row",
    "step",
    "unavailable_because",
    "uniform",
]
