"""The operations as ``torch.compile`` and ``torch.export`` see them: opaque operators ``fastdiff::...``.

Each operator runs the backend that is chosen for its device when the program runs, so a compiled step has the bits of
an eager one, and one graph serves all t, seeds and scales. The operators are defined with ``torch.library``, with fake
implementations and, but for the step, gradients. For gradients of coefficients, and of x0 in a loss, the reference is
traced instead. Eager calls do not come here: they go to the backend directly, which costs less.

In a compiled program the gradient of the prediction is computed in the backward, not in the pass of the loss: an
operator may neither return nor change what it was given. Nothing that is made while tracing is cached. PyTorch 2.6
cannot export an objective, because it takes no tables along; later versions can.
"""

from .backend import Operators

operators = Operators()

__all__ = ["Operators", "operators"]
