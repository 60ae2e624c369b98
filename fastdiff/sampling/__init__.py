"""Drawing samples: ``sample``."""

from .loop import TrainedOn, sample

__all__ = ["TrainedOn", "sample"]
