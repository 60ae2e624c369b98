"""fastdiff: the arithmetic around a diffusion model, as fast as the memory allows."""

import importlib
from types import ModuleType

from . import (
    autoencoder,
    distributed,
    guidance,
    losses,
    ops,
    pairing,
    samplers,
    timesteps,
    uncertainty,
    video,
    weighting,
)
from .backends import use_backend
from .distributed import debug
from .dropout import drop_condition
from .functional import diffusion_loss, q_sample
from .likelihood import log_likelihood, to_bits_per_dim
from .losses.autoencoder import AutoencoderLoss
from .losses.bits_per_dim import BitsPerDim, bits_per_dim
from .losses.resampling import LossSecondMoment
from .losses.vlb import VariationalBound
from .noised import Noised
from .objective import Objective
from .prediction import Prediction
from .process import EDM, Process, RectifiedFlow, VariancePreserving
from .pyramid import pyramid_noise
from .recycling import release_memory
from .sampling import sample
from .sdes import VESDE, VPSDE, Cosine, SubVPSDE, TrigFlow
from .tokens import Tokens
from .weighting import (
    P2,
    SNR,
    Bell,
    CosMap,
    Debiased,
    EDMWeighting,
    Interpolated,
    InverseAlphaBar,
    Likelihood,
    MinSNR,
    PerTimestep,
    SigmaLinear,
    SigmaSqrt,
    SoftMinSNR,
    TruncatedSNR,
    Uniform,
)

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "P2",
    "SNR",
    "VESDE",
    "VPSDE",
    "AutoencoderLoss",
    "Bell",
    "BitsPerDim",
    "CosMap",
    "Cosine",
    "Debiased",
    "EDMWeighting",
    "Interpolated",
    "InverseAlphaBar",
    "Likelihood",
    "LossSecondMoment",
    "MinSNR",
    "Noised",
    "Objective",
    "PerTimestep",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "SigmaLinear",
    "SigmaSqrt",
    "SoftMinSNR",
    "SubVPSDE",
    "Tokens",
    "TrigFlow",
    "TruncatedSNR",
    "Uniform",
    "VariancePreserving",
    "VariationalBound",
    "autoencoder",
    "bits_per_dim",
    "debug",
    "diffusion_loss",
    "distributed",
    "drop_condition",
    "guidance",
    "integrations",
    "log_likelihood",
    "losses",
    "ops",
    "pairing",
    "pyramid_noise",
    "q_sample",
    "release_memory",
    "sample",
    "samplers",
    "timesteps",
    "to_bits_per_dim",
    "uncertainty",
    "use_backend",
    "video",
    "weighting",
]


def __getattr__(name: str) -> ModuleType:
    """``fastdiff.integrations``, imported when it is first used: its modules cost nothing before."""
    if name == "integrations":
        return importlib.import_module(f"{__name__}.integrations")
    where = ""
    for module in (autoencoder, distributed, guidance, losses, ops, pairing, samplers, timesteps, uncertainty, video):
        if name in getattr(module, "__all__", ()) or str(getattr(vars(module).get(name), "__module__", "")).startswith(
            module.__name__
        ):
            where = f": it is {module.__name__}.{name}"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{where}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
