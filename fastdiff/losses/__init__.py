"""Losses: the error functions; ``fastdiff.losses.vlb``, the variational bound; ``fastdiff.losses.autoencoder``."""

from .error_functions import FUNCTIONS, L1, MSE, NEED_C, Huber, LogCosh, Loss, PseudoHuber, SmoothL1, get

__all__ = ["FUNCTIONS", "L1", "MSE", "NEED_C", "Huber", "LogCosh", "Loss", "PseudoHuber", "SmoothL1", "get"]
