"""The reference backend: every operation in plain PyTorch, on any device. The others must equal it."""

from ..rows import gather
from .operations import COLUMNS, convert, loss, noise, step
from .philox import normal, uniform

__all__ = ["COLUMNS", "convert", "gather", "loss", "noise", "normal", "step", "uniform"]
