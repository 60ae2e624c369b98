"""The native backend: the operations on the CPU in C++ (csrc/), vectorised, one pass each.

What it does not do, the reference does: under ``torch.func``, for tensor subclasses, and where
gradients are asked for that are not those of a training step (of the coefficients, of x0 in a loss, of a step).
"""

from .backend import Native

backend = Native()

__all__ = ["Native", "backend"]
