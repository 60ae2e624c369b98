"""The reference backend: every operation in plain PyTorch, on any device. The others must equal it."""

from .coefficients import evaluate, times
from .operations import convert, loss, loss_gradient, noise, rows_of_mean, step
from .philox import normal, uniform
from .trajectory import Trajectory

__all__ = [
    "Trajectory",
    "convert",
    "evaluate",
    "loss",
    "loss_gradient",
    "noise",
    "normal",
    "rows_of_mean",
    "step",
    "times",
    "uniform",
]
