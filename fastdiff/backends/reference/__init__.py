"""The reference backend: every operation in plain PyTorch, on any device. The others must equal it."""

from .operations import convert, loss, noise, step
from .philox import normal, uniform

__all__ = ["convert", "loss", "noise", "normal", "step", "uniform"]
