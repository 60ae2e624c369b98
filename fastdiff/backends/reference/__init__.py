"""The reference backend: every operation in plain PyTorch, on any device. The others must equal it."""

from ..rows import gather
from .operations import COLUMNS, convert, loss, loss_gradient, noise, step
from .philox import normal, uniform
from .trajectory import Trajectory

__all__ = ["COLUMNS", "Trajectory", "convert", "gather", "loss", "loss_gradient", "noise", "normal", "step", "uniform"]
