"""Drawing samples: ``sample``. It is read in this order: ``request`` (what a run is asked), ``checking``, ``loop``."""

from .loop import sample
from .request import TrainedOn

__all__ = ["TrainedOn", "sample"]
