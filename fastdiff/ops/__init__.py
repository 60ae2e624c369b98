"""The fused operations: checks and dispatch. They know rows of coefficients, and nothing of diffusion."""

from ..philox import Philox
from .convert import convert
from .loss import loss
from .noise import noise
from .prepared import PreparedNoise, PreparedSteps
from .step import COLUMNS, step
from .trajectory import trajectory

__all__ = ["COLUMNS", "Philox", "PreparedNoise", "PreparedSteps", "convert", "loss", "noise", "step", "trajectory"]
