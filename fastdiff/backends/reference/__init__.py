"""The reference backend: every operation in plain PyTorch, on any device. The others must equal it."""

from .backend import Reference
from .loss import rows_of_mean
from .trajectory import Trajectory

backend = Reference()

__all__ = ["Reference", "Trajectory", "backend", "rows_of_mean"]
