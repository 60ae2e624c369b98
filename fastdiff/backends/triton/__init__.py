"""The Triton backend: the operations on a GPU, one pass each.

What it does not do, the reference does: float64 data, ``torch.func``, tensor subclasses, and gradients that are not
those of a training step (of the coefficients, of x0 in a loss, of a step; second derivatives).

Triton is imported at the first call. With TRITON_INTERPRET=1 its interpreter runs the kernels on CPU tensors, slowly.
"""

from .backend import Triton
from .interpreter import interpreted

backend = Triton()

__all__ = ["Triton", "backend", "interpreted"]
