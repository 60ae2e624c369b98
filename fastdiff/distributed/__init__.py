"""The same numbers on 1, 2 or 64 processes, with ``torch.distributed``: noise, loss and gradient of a whole batch of
which each process has a part.

- ``Part`` says which part a process has, of samples, frames, rows of pixels or tokens. ``objective.noise(x0,
  part=part)`` gives the part of the noise that the whole has; the loss of it is the whole's loss, on every rank.
- ``data_parallel`` says which processes hold different samples, for calls without a part and without a seed.
- ``debug`` (``fastdiff.debug``) has ranks compare what they were given.
"""

from .agreeing import debug
from .part import Part
from .ranks import data_parallel

__all__ = ["Part", "data_parallel", "debug"]
