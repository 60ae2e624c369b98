"""The reference backend: every operation in plain PyTorch, on any device. The others must equal it."""

from .operations import COLUMNS, convert, loss, noise, step
from .philox import normal, uniform
from .trajectory import Trajectory

__all__ = ["COLUMNS", "Trajectory", "convert", "loss", "noise", "normal", "step", "uniform"]
