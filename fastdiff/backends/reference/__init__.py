"""The reference backend: every operation in plain PyTorch, on any device. The others must equal it."""

from ...tensors import gather
from .operations import convert, loss, loss_gradient, noise, rows_of_mean, step
from .philox import normal, uniform
from .trajectory import Trajectory

__all__ = [
    "Trajectory",
    "convert",
    "gather",
    "loss",
    "loss_gradient",
    "noise",
    "normal",
    "rows_of_mean",
    "step",
    "uniform",
]
