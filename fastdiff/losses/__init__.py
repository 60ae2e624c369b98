"""Losses: the error functions, and in ``fastdiff.losses.vlb`` the variational bound."""

from .error_functions import FUNCTIONS, L1, MSE, NEED_C, Huber, LogCosh, Loss, PseudoHuber, SmoothL1, get

__all__ = ["FUNCTIONS", "L1", "MSE", "NEED_C", "Huber", "LogCosh", "Loss", "PseudoHuber", "SmoothL1", "get"]
