"""The reference backend: every operation in plain PyTorch, on any device. The others must equal it."""

from ..rows import gather
from .operations import COLUMNS, convert, loss, loss_gradient, noise, step
from .philox import normal, uniform

__all__ = ["COLUMNS", "convert", "gather", "loss", "loss_gradient", "noise", "normal", "step", "uniform"]
